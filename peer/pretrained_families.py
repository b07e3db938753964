"""Petals' classes of one family: the Auto classes that accept this family only. Every other family opens with those."""

from __future__ import annotations

from petals.peer.pretrained import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedSpeculativeModel,
)


class DistributedBloomConfig(AutoDistributedConfig):
    __doc__ = AutoDistributedConfig.__doc__
    model_type = "bloom"


class DistributedBloomModel(AutoDistributedModel):
    __doc__ = AutoDistributedModel.__doc__
    model_type = "bloom"


class DistributedBloomForCausalLM(AutoDistributedModelForCausalLM):
    __doc__ = AutoDistributedModelForCausalLM.__doc__
    model_type = "bloom"


class DistributedBloomForSequenceClassification(AutoDistributedModelForSequenceClassification):
    __doc__ = AutoDistributedModelForSequenceClassification.__doc__
    model_type = "bloom"


class DistributedBloomForSpeculativeGeneration(AutoDistributedSpeculativeModel):
    __doc__ = AutoDistributedSpeculativeModel.__doc__
    model_type = "bloom"


class DistributedLlamaConfig(AutoDistributedConfig):
    __doc__ = AutoDistributedConfig.__doc__
    model_type = "llama"


class DistributedLlamaModel(AutoDistributedModel):
    __doc__ = AutoDistributedModel.__doc__
    model_type = "llama"


class DistributedLlamaForCausalLM(AutoDistributedModelForCausalLM):
    __doc__ = AutoDistributedModelForCausalLM.__doc__
    model_type = "llama"


class DistributedLlamaForSequenceClassification(AutoDistributedModelForSequenceClassification):
    __doc__ = AutoDistributedModelForSequenceClassification.__doc__
    model_type = "llama"


class DistributedLlamaForSpeculativeGeneration(AutoDistributedSpeculativeModel):
    __doc__ = AutoDistributedSpeculativeModel.__doc__
    model_type = "llama"


class DistributedFalconConfig(AutoDistributedConfig):
    __doc__ = AutoDistributedConfig.__doc__
    model_type = "falcon"


class DistributedFalconModel(AutoDistributedModel):
    __doc__ = AutoDistributedModel.__doc__
    model_type = "falcon"


class DistributedFalconForCausalLM(AutoDistributedModelForCausalLM):
    __doc__ = AutoDistributedModelForCausalLM.__doc__
    model_type = "falcon"


class DistributedFalconForSequenceClassification(AutoDistributedModelForSequenceClassification):
    __doc__ = AutoDistributedModelForSequenceClassification.__doc__
    model_type = "falcon"


class DistributedFalconForSpeculativeGeneration(AutoDistributedSpeculativeModel):
    __doc__ = AutoDistributedSpeculativeModel.__doc__
    model_type = "falcon"


class DistributedMixtralConfig(AutoDistributedConfig):
    __doc__ = AutoDistributedConfig.__doc__
    model_type = "mixtral"


class DistributedMixtralModel(AutoDistributedModel):
    __doc__ = AutoDistributedModel.__doc__
    model_type = "mixtral"


class DistributedMixtralForCausalLM(AutoDistributedModelForCausalLM):
    __doc__ = AutoDistributedModelForCausalLM.__doc__
    model_type = "mixtral"


class DistributedMixtralForSequenceClassification(AutoDistributedModelForSequenceClassification):
    __doc__ = AutoDistributedModelForSequenceClassification.__doc__
    model_type = "mixtral"


class DistributedMixtralForSpeculativeGeneration(AutoDistributedSpeculativeModel):
    __doc__ = AutoDistributedSpeculativeModel.__doc__
    model_type = "mixtral"
