"""The config of a run: its options, and how files and `key=value` become one checked tree."""

from pipeline.config.effects import Effect
from pipeline.config.errors import ConfigError, Ended
from pipeline.config.sections import Adapter, Data, Eval, Gate, Keep, Model, Promote, Section, Tracking, Train
from pipeline.config.tree import (
    VIT_SCHEMA,
    Config,
    affects_result,
    describe,
    digest,
    effects,
    flatten,
    is_vit,
    load_config,
    load_config_with_origin,
    override,
    to_yaml,
    whole_options,
)

__all__ = [
    "VIT_SCHEMA",
    "Adapter",
    "Config",
    "ConfigError",
    "Data",
    "Effect",
    "Ended",
    "Eval",
    "Gate",
    "Keep",
    "Model",
    "Promote",
    "Section",
    "Tracking",
    "Train",
    "affects_result",
    "describe",
    "digest",
    "effects",
    "flatten",
    "is_vit",
    "load_config",
    "load_config_with_origin",
    "override",
    "to_yaml",
    "whole_options",
]
