"""LightningModules that train with forward passes only."""

from zo_lightning.modules.base import ZOModule
from zo_lightning.modules.candidates import CandidateModule
from zo_lightning.modules.classification import CausalLMClassificationModule
from zo_lightning.modules.decoding import GreedyDecoder, stop_tokens
from zo_lightning.modules.errors import ModelError
from zo_lightning.modules.generation import CausalLMGenerationModule
from zo_lightning.modules.language_model import LanguageModelModule
from zo_lightning.modules.learning_to_learn import FineTunerTraining
from zo_lightning.modules.multiple_choice import CausalLMMultipleChoiceModule
from zo_lightning.modules.pretrained import load_causal_lm, weights_dtype
from zo_lightning.modules.prompted import PromptedModule
from zo_lightning.modules.scoring import (
    by_example,
    candidate_log_likelihoods,
    candidate_scores,
    classification_losses,
    label_losses,
)
from zo_lightning.modules.steps import batches_per_step, planned_steps

__all__ = [
    "CandidateModule",
    "CausalLMClassificationModule",
    "CausalLMGenerationModule",
    "CausalLMMultipleChoiceModule",
    "FineTunerTraining",
    "GreedyDecoder",
    "LanguageModelModule",
    "ModelError",
    "PromptedModule",
    "ZOModule",
    "batches_per_step",
    "by_example",
    "candidate_log_likelihoods",
    "candidate_scores",
    "classification_losses",
    "label_losses",
    "load_causal_lm",
    "planned_steps",
    "stop_tokens",
    "weights_dtype",
]
