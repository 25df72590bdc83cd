"""Compare how llama.cpp tokenizes with a GGUF file's vocabulary with how Transformers' tokenizer does.

    python tools/referee_gguf_tokens.py --judge PYTHON [--text FILE ...] TOKENIZER_FOLDER ...

Every folder is one that `AutoTokenizer.from_pretrained` opens. A thousand lines are compared: prose of the files given,
code, numbers, many scripts, emoji, odd spaces, control characters, special tokens. PYTHON has llama-cpp-python.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_JUDGE = ROOT / "test" / "referees" / "llama_cpp" / "judge.py"
_CONFIG = dict(
    model_type="llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, hidden_act="silu",
)  # fmt: skip
SCRIPTS = (
    "Größe, façade, naïve, coöperate, Ångström, smörgåsbord, œuvre, Łódź, žluťoučký kůň, İstanbul'da",
    "Съешь же ещё этих мягких французских булок, да выпей чаю; нещо на Български",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Πόσο κάνει;",
    "我想在apple工作1314151天～，你好世界！“引号”、《书名》。",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがなｱｲｳ",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص عربي مع أرقام ١٢٣٤٥ و English معا؛ فارسی ۱۲۳",
    "שלום עולם, מה שלומך? 12.5%",
    "नमस्ते दुनिया, यह एक परीक्षण है। १२३",
    "កាន់តែពិសេសអាចខលើសពីនេះ ภาษาไทยไม่มีช่องว่าง ພາສາລາວ",
    "ಕನ್ನಡ தமிழ் తెలుగు മലയാളം বাংলা ગુજરાતી",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ﬁﬂ ½ ¾ ² ³ ₂ Ⅷ № ™ © € £ ¥ ₿ ∑∫√∞≈≠±×÷",
    "🚀 (normal) 😶‍🌫️ (joined) ✅ 🦙🦙 👨‍👩‍👧‍👦 🇩🇪🇯🇵 👍🏽 ❤️‍🔥 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
)
SPACES = " \t\n\r\v\f\u00a0\u2002\u2003\u2009\u200b\u200d\u2028\u2029\u202f\u3000\ufeff\u1680\x85"


def lines_of_text(count: int, prose: list[str], special: list[str], seed: int = 0) -> list[str]:
    """`count` texts of all kinds, the same for the same arguments."""
    pick = random.Random(seed)
    code = textwrap.dedent(inspect.getsource(json.decoder)).splitlines() + inspect.getsource(argparse).splitlines()
    code = [line for line in code if line.strip()]
    prose = prose or [" ".join(pick.choices(" ".join(SCRIPTS[:2]).split(), k=12)) for _ in range(200)]

    def number() -> str:
        forms = ("{:d}", "{:,}", "-{:d}", "{:x}", "0x{:08X}", "{:d}.{:d}", "1e-{:d}", "${:d}", "{:d}%", "v{:d}.0.{:d}")
        return pick.choice(forms).format(pick.randrange(10 ** pick.randrange(1, 14)), pick.randrange(999))

    def spaced() -> str:
        words = pick.choice(prose).split()[:8] or ["a"]
        return "".join(w + "".join(pick.choices(SPACES, k=pick.randrange(1, 5))) for w in words)

    def anything() -> str:
        ranges = ((1, 0x80), (0x80, 0x250), (0x300, 0x530), (0x2000, 0x2C00), (0x3000, 0x3100), (0xE000, 0xE010))
        return "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randrange(1, 30)))

    def with_special() -> str:
        parts = [pick.choice(prose)[:40], pick.choice(special or ["</s>"]), pick.choice(["", " ", "\n"]), "hello"]
        return pick.choice(["", " "]).join(parts)

    kinds = (
        (30, lambda: pick.choice(prose)),
        (10, lambda: "\n".join(pick.choices(prose, k=2)) + pick.choice(["", "\n", "\n\n", "\r\n"])),
        (18, lambda: "\n".join(code[(at := pick.randrange(len(code) - 4)) : at + pick.randrange(1, 4)])),
        (10, lambda: " ".join(number() for _ in range(pick.randrange(1, 6)))),
        (12, lambda: pick.choice(SCRIPTS)[pick.randrange(8) :]),
        (6, spaced),
        (5, anything),
        (5, with_special),
        (
            4,
            lambda: (
                pick.choice(["I'VE", "you'Re", "it's", "'LL", "don''t", "''''", "!!!???", "-----=====", "...…"]) * 3
            ),
        ),
    )
    weights = [weight for weight, _ in kinds]
    return [pick.choices(kinds, weights)[0][1]() for _ in range(count)]


def without_leading_spaces(text: str, special: list[str]) -> str:
    """`text` with no space at its start, nor after a special token."""
    text = text.lstrip(" ")
    for token in special:
        text = token.join(part.lstrip(" ") if i else part for i, part in enumerate(text.split(token)))
    return text


def write_vocabulary(tokenizer: Any, folder: Path, out: Path) -> Any:
    """A GGUF file with nothing but a vocabulary; returns the `Vocabulary`."""
    import gguf

    from auto_round.gguf.conversion import conversion_for
    from auto_round.gguf.vocab import vocabulary_for

    rows = max(tokenizer.get_vocab().values()) + 1
    vocabulary = vocabulary_for(tokenizer, rows, None, folder)
    writer = gguf.GGUFWriter(out, "llama")
    for entry in (*conversion_for(_CONFIG | {"vocab_size": rows}).metadata(), *vocabulary.metadata):
        writer.add_key_value(*entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return vocabulary


def main() -> int:
    """Compare all folders; 1 when a text is tokenized otherwise."""
    from transformers import AutoTokenizer

    from auto_round.gguf.vocab import SPACE_NOTE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    prose = [line for path in options.text for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prose = random.Random(1).sample(prose, min(len(prose), 2000))
    wrong = 0
    for folder in options.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = [str(token) for token in tokenizer.all_special_tokens]
        texts = lines_of_text(options.lines, prose, special)
        texts += [plain for text in texts if (plain := without_leading_spaces(text, special)) != text]
        with tempfile.TemporaryDirectory() as work:
            file, asked, out = (Path(work) / name for name in ("vocab.gguf", "texts.json", "ids.json"))
            vocabulary = write_vocabulary(tokenizer, folder, file)
            asked.write_text(json.dumps(texts))
            command = [*options.judge.split(), str(_JUDGE), "--tokens", str(file), str(asked), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{folder}: {done.stderr[-500:]}")
                wrong += 1
                continue
            theirs = json.loads(out.read_text())
        ours = [list(tokenizer(text).input_ids) for text in texts]
        differ = [i for i in range(len(texts)) if ours[i] != theirs[i]]
        # Both are what the note says: a space at the start, or after a special token, is another one there.
        spaced = [
            i
            for i in differ
            if without_leading_spaces(texts[i], special) != texts[i] or any(token in texts[i] for token in special)
        ]
        known = SPACE_NOTE in vocabulary.notes
        bad = [i for i in differ if not (known and i in spaced)]
        wrong += bool(bad)
        kind, pre = (pair.value for pair in vocabulary.metadata[:2])
        print(
            f"{folder}: {kind}, {pre}: {len(bad)} of {len(texts)} differ"
            + (f", {len(spaced)} more by spaces at the start or after special tokens" if known else ""),
            *vocabulary.notes,
            flush=True,
        )
        for i in bad[:5]:
            at = next((j for j, (a, b) in enumerate(zip(ours[i], theirs[i], strict=False)) if a != b), -1)
            print(f"    {ascii(texts[i])[:150]}\n      at {at}: {ours[i][at:][:12]} | {theirs[i][at:][:12]}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
