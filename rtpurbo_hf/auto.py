"""Make our classes known to transformers' Auto classes, for checkpoints loaded without `trust_remote_code`."""

from transformers import AutoConfig, AutoModelForCausalLM

from .modeling.configuration_rtpurbo import RTPurboConfig
from .modeling.modeling_rtpurbo import RTPurboForCausalLM

AutoConfig.register(RTPurboConfig.model_type, RTPurboConfig, exist_ok=True)
AutoModelForCausalLM.register(RTPurboConfig, RTPurboForCausalLM, exist_ok=True)

__all__ = ["RTPurboConfig", "RTPurboForCausalLM"]
