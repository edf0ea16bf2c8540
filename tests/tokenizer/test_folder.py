from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lmssl.errors import TokenizerError
from lmssl.tokenizer.build import TokenizerBuild, load_build
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.folder import build_yaml, check_output
from lmssl.tokenizer.load import load_tokenizer
from lmssl.tokenizer.train import build_tokenizer

from .conftest import KINDS, Make

FILES = ["README.md", "build.yaml", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
