"""Tiny models of many families with random weights, saved once per session."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Tests compute as on a CPU without matrix instructions for halves, in float32 (docs/adr/0005), so that they compare the
# same numbers on every machine. PyTorch reads this at its first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("no-clock", deadline=None)  # machines are slow at times
hypothesis.settings.load_profile("no-clock")

sys.path.append(str(Path(__file__).parent))  # helpers that several folders share

# Journals and tracebacks of the tests do not land where pytest is run. A fixture would come too late for others of a
# wider scope that run jobs.
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a work space of its own
    os.environ["AR_WORK_SPACE"] = tempfile.mkdtemp(prefix="auto-round-tests-")
os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="auto-round-tests-"))

_COMMON: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attention_dropout=0.0,
)  # fmt: skip
_MOE: dict[str, Any] = dict(
    num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[]
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON | dict(tie_word_embeddings=False)),
    "llama-tied": ("LlamaConfig", _COMMON | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", _COMMON | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", _COMMON | dict(head_dim=8)),
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=24, do_layer_norm_before=True, dropout=0.0, pad_token_id=0,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _COMMON
        | dict(
            num_hidden_layers=4, head_dim=8, sliding_window=4, tie_word_embeddings=True,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi": ("PhiConfig", _COMMON | dict(num_key_value_heads=4, resid_pdrop=0.0, embd_pdrop=0.0)),
    "mistral": ("MistralConfig", _COMMON | dict(sliding_window=4)),
    "falcon-alibi": (
        "FalconConfig",
        dict(
            vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True, multi_query=False,
            new_decoder_architecture=False, parallel_attn=False, bias=True, hidden_dropout=0.0, attention_dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "falcon-rotary": (
        "FalconConfig",
        dict(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, alibi=False,
            new_decoder_architecture=True, parallel_attn=True, bias=False, hidden_dropout=0.0, attention_dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "mixtral": ("MixtralConfig", _COMMON | dict(num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2)),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        _COMMON | _MOE | dict(num_hidden_layers=3, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    ),
    "qwen3-moe": ("Qwen3MoeConfig", _COMMON | _MOE | dict(num_hidden_layers=2, head_dim=8)),
    "gpt-oss": (
        "GptOssConfig",
        _COMMON
        | dict(
            num_hidden_layers=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    # Its checkpoints store q, k and v convolutions apart, the modules joined.
    "olmo-hybrid": (
        "OlmoHybridConfig",
        _COMMON
        | dict(
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=16,
            linear_conv_kernel_dim=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    # Its checkpoints store gate, q, k and v joined, the modules apart.
    "hrm-text": ("HrmTextConfig", _COMMON),
    "qwen3-next": (
        "Qwen3NextConfig",
        _COMMON
        | _MOE
        | dict(
            num_hidden_layers=3, head_dim=8, shared_expert_intermediate_size=24, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
}  # fmt: skip


# Widths that packed layouts take (multiples of 32), a vocabulary for the byte tokenizer, and short enough to be quick.
_WIDE: dict[str, Any] = dict(vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
_EXPERTS: dict[str, Any] = dict(head_dim=16, moe_intermediate_size=32, num_experts=4)
PACKABLE: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "llama-tied": _WIDE,
    "qwen2": _WIDE,
    "mistral": _WIDE,
    "phi": _WIDE,
    "opt": dict(vocab_size=288, hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=2),
    "gpt2": dict(vocab_size=288, n_embd=64, n_layer=2),
    "gemma3": _WIDE | dict(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
    "falcon-alibi": dict(vocab_size=288, hidden_size=64, num_hidden_layers=2),
    "mixtral": _WIDE | dict(num_local_experts=4),
    "qwen2-moe": _WIDE | _EXPERTS | dict(shared_expert_intermediate_size=64),
    "qwen3-moe": _WIDE | _EXPERTS,
    "gpt-oss": _WIDE | dict(head_dim=16),
}


def build_tiny(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model of the family in float32 whose weights, norms and biases included, are all random."""
    import transformers

    name, values = FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)(**(values | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.2))
                if parameter.dim() == 1:
                    parameter.add_(0.5)
    return model.eval()


@pytest.fixture
def earlier_int8() -> Iterator[str]:
    """Name of a format that our own loader opens: compressed-tensors' tensors under an auto-round config."""
    from auto_round.formats.base import FORMATS, available_formats, register_format
    from auto_round.formats.config_compressed_tensors import CompressedTensorsFormat, PackedInt8Format

    available_formats()
    tensors = CompressedTensorsFormat()

    @register_format("earlier:int8")
    class Earlier(PackedInt8Format):
        def layout(self, scheme: Any) -> Any:
            return tensors.layout(scheme)

        def scheme_problem(self, scheme: Any) -> str | None:
            return tensors.scheme_problem(scheme)

    yield "earlier:int8"
    del FORMATS["earlier:int8"]


@pytest.fixture
def registries() -> Iterator[None]:
    """What plugins register is forgotten after the test."""
    import auto_round.formats.no_config  # noqa: F401  (lists the schemes there are when it is first imported)
    from auto_round import PRESET_SCHEMES, plugins
    from auto_round.algorithms.base import ALGORITHMS
    from auto_round.algorithms.transforms.base import TRANSFORMS
    from auto_round.calib_dataset import DATASETS
    from auto_round.codecs.base import CODECS
    from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS
    from auto_round.codecs.minifloat import MINIFLOATS
    from auto_round.codecs.registry import QUANT_FUNC_WITH_DTYPE
    from auto_round.formats.base import FORMATS, available_formats
    from auto_round.gguf.families import FAMILIES as GGUF_FAMILIES
    from auto_round.inference.config import PACKINGS
    from auto_round.inference.table import BACKENDS

    available_formats()
    tables: list[dict[str, Any]] = [
        PRESET_SCHEMES, ALGORITHMS, DATASETS, CODECS, BLOCK_FLOAT_SPECS, MINIFLOATS, QUANT_FUNC_WITH_DTYPE, FORMATS,
        PACKINGS, GGUF_FAMILIES, plugins._LOADED, TRANSFORMS,
    ]  # fmt: skip
    before, rows, modules = [dict(table) for table in tables], list(BACKENDS), set(sys.modules)
    plugins._load_entry_points.cache_clear()
    yield
    plugins._load_entry_points.cache_clear()
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    BACKENDS[:] = rows
    for name in set(sys.modules) - modules:
        if name.startswith(plugins._PREFIX):
            del sys.modules[name]


@pytest.fixture(scope="session")
def families() -> list[str]:
    return list(FAMILIES)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(family, seed=0, **config changes)`: a fresh model in memory."""
    return build_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(family, **save_pretrained options)`: the saved model's folder; do not write to it."""
    made: dict[str, Path] = {}

    def folder(family: str, **options: Any) -> Path:
        key = family + repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            build_tiny(family).save_pretrained(made[key], **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def packable_model() -> Callable[..., torch.nn.Module]:
    """`packable_model(family, **config changes)`: a fresh model all of whose usual layers can be packed."""
    return lambda family, **changes: build_tiny(family, **{**PACKABLE[family], **changes})


@pytest.fixture(scope="session")
def packable_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Callable[..., str]:
    """`packable_folder(family, **config changes)`: that model saved with a tokenizer; do not write to the folder."""
    made: dict[str, str] = {}

    def folder(family: str, **changes: Any) -> str:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(family))
            build_tiny(family, **{**PACKABLE[family], **changes}).save_pretrained(made[key])
            byte_tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One id a byte, and <bos>, <eos>, <pad>: 259 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<bos>", "<eos>", "<pad>"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Callable[..., str]:
    """`gguf_folder(family, **config changes)`: a model of widths that K types take, whose tokenizer splits words as
    GPT-2's does, which llama.cpp knows."""
    from tokenizers import pre_tokenizers

    made: dict[str, str] = {}

    def folder(family: str, **changes: Any) -> str:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(family))
            wide = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
            build_tiny(family, **{**PACKABLE[family], **wide, **changes}).save_pretrained(made[key])
            tokenizer = copy.deepcopy(byte_tokenizer)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def token_ids() -> list[torch.Tensor]:
    """Eight samples of 24 token ids, for `AutoRound(dataset=...)`."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 250, (24,), generator=generator) for _ in range(8)]


@pytest.fixture(scope="session")
def tiny_opt_model_path(packable_folder: Callable[..., str]) -> str:
    return packable_folder("opt")


@pytest.fixture(scope="session")
def dataloader(token_ids: list[torch.Tensor]) -> Any:
    """A DataLoader of batches of token ids."""
    return torch.utils.data.DataLoader(token_ids, batch_size=1)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Checkpoints that another implementation made; skips where they are not."""
    shared = os.environ.get("AR_TEST_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    folder = Path(shared) / "golden"
    if not folder.is_dir():
        pytest.skip("golden checkpoints are not here; set AR_TEST_SHARED")
    return folder


@pytest.fixture
def stop_at() -> Callable[..., AbstractContextManager[None]]:
    """`with stop_at(module, name, call=1, error=KeyboardInterrupt):` raise at that call of a function."""

    @contextmanager
    def patched(owner: Any, name: str, call: int = 1, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
        real, count = getattr(owner, name), [0]

        def stopping(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == call:
                raise error("a planted stop")
            return real(*args, **kwargs)

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, stopping)
                yield
        finally:
            assert count[0] >= call, "the place was never reached"

    return patched
