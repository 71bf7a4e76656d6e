"""One small tokenizer a style for all tests of the text room."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadal.text import Tokenizer
from tests.helpers.tiny_tokenizer import STYLES, make_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {style: make_tiny_tokenizer(root / style, 640, style) for style in STYLES}


@pytest.fixture(scope="session")
def tokenizers_by_style(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {style: Tokenizer.load(folder) for style, folder in tokenizer_folders.items()}


@pytest.fixture(scope="session", params=sorted(STYLES))
def tokenizer(request: pytest.FixtureRequest, tokenizers_by_style: dict[str, Tokenizer]) -> Tokenizer:
    """Each style in turn."""
    return tokenizers_by_style[request.param]


@pytest.fixture(scope="session")
def deepseek(tokenizers_by_style: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_style["deepseek"]
