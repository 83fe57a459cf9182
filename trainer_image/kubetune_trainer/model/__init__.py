"""The model, its shape and its weights."""

from kubetune_trainer.model.attention import KVCache
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import build_model, load_model, load_weights

__all__ = ["Decoder", "KVCache", "ModelConfig", "build_model", "load_model", "load_weights", "read_config"]
