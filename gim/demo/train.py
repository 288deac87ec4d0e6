"""Train the demo model on the text of a Debian machine: `python -m gim.demo.train --out DIR`.

A Llama of about a million parameters learns to look up a fact that its prompt states. Trained on
whole prompts from the start it stays on a plateau, guessing among the stated words. So it goes
through lessons: whose word is it; "Irene is lantern." with few names, then more; whole sentences
and questions; then filler text, ever longer. Each training text ends in questions about several
facts, so that many answers share the cost of one text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from gim.demo import prompts, recall

LICENCES = Path("/usr/share/common-licenses")
# The shipped filler, of which most is held out, contains the text of this licence.
_NOT_FOR_TRAINING = "CC0-1.0"

# The layer after which the owner of a word must be known; the layers behind it are left to look
# the asked owner up.
_OWNER_LAYER = 2

VOCABULARY = 2048
BOS = "<s>"
PAD = "<pad>"

log = logging.getLogger("gim.demo.train")


@dataclass(frozen=True)
class Lesson:
    """One step of the curriculum.

    Args:
        name: what the log calls it.
        statement: a fact, with {name} and {word}.
        question: what stands before the answer, with {name}.
        facts: least and greatest number of different facts in a text.
        questions: number of questions at the end; 0 asks about every fact once.
        tokens: least and greatest length of the filler, in tokens; (0, 0) for none.
        batch: texts per step.
        steps: greatest number of steps.
        enough: share of right answers, averaged over steps, at which the lesson ends early; a
            value above 1 never ends it early.
        answer_weight: weight of the loss on the answers.
        owner_weight: weight of the loss on the owners of the words (see `train`).
    """

    name: str
    statement: str
    question: str
    facts: tuple[int, int]
    questions: int
    tokens: tuple[int, int]
    batch: int
    steps: int
    enough: float
    answer_weight: float = 1.0
    owner_weight: float = 0.3


_SHORT = (" {name} is {word}.", " {name} is")
_ASKED = (" " + prompts.FACT, prompts.QUESTION)

CURRICULUM: tuple[Lesson, ...] = (
    Lesson("owners", *_SHORT, (4, 4), 12, (0, 0), 16, 200, 2.0, 1.0, 1.0),
    Lesson("2 to 4 names", *_SHORT, (2, 4), 12, (0, 0), 16, 2500, 0.90),
    Lesson("2 to 8 names", *_SHORT, (2, 8), 16, (0, 0), 16, 2500, 0.95),
    Lesson("questions", *_ASKED, (2, 8), 0, (0, 0), 20, 1200, 0.97),
    Lesson("filler to 128", *_ASKED, (2, 8), 0, (16, 128), 16, 500, 0.97),
    Lesson("filler to 512", *_ASKED, (4, 12), 0, (64, 512), 8, 500, 0.97),
    Lesson("filler to 1024", *_ASKED, (4, 12), 0, (256, 1024), 6, 300, 0.98, 1.0, 0.0),
    Lesson("filler to 2300", *_ASKED, (4, 16), 0, (512, 2300), 4, 240, 2.0, 1.0, 0.0),
)


@dataclass
class Text:
    """A training text: its tokens and the places that a loss is on.

    Args:
        ids: token ids, BOS first.
        before_answers: index of the last token before each answer.
        owners: pairs of the index of a stated word, or of the last token before an answer, and
            which of `prompts.NAMES` it belongs to.
    """

    ids: list[int]
    before_answers: list[int] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)


def read_licences(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Read the licences of a Debian machine as filler passages.

    Args:
        folder: usually /usr/share/common-licenses, from the package base-files.

    Returns:
        The passages, paragraphs without line breaks of 8 to 120 words in which no name or word of
        a fact occurs; and the SHA-256 of every file read, by file name.

    Raises:
        FileNotFoundError: if the folder is missing or holds too little text to train on.
    """
    files = []
    if folder.is_dir():
        # Links such as GPL -> GPL-3 would count a text twice.
        files = sorted(f for f in folder.iterdir() if f.is_file() and not f.is_symlink())
    reserved = {*prompts.NAMES, *prompts.WORDS}
    digests: dict[str, str] = {}
    passages: list[str] = []
    for file in files:
        if file.name == _NOT_FOR_TRAINING:
            continue
        raw = file.read_bytes()
        digests[file.name] = hashlib.sha256(raw).hexdigest()
        for paragraph in re.split(r"\n\s*\n", raw.decode("utf-8", errors="replace")):
            passage = " ".join(paragraph.split())
            plain = reserved.isdisjoint(re.findall(r"[A-Za-z]+", passage))
            if plain and 8 <= len(passage.split()) <= 120:
                passages.append(passage)
    if sum(map(len, passages)) < 100_000:
        raise FileNotFoundError(
            f"{folder} holds {len(passages)} usable passages, too few to train on: this script "
            "needs the licence texts of the Debian package base-files"
        )
    return passages, digests


def train_tokenizer(passages: Sequence[str], rng: random.Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every name and word of a fact is one token.

    Args:
        passages: filler for training.
        rng: source of randomness; advanced.

    Returns:
        A fast tokenizer that puts BOS first by itself.

    Raises:
        RuntimeError: if some name or word did not become one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Names and words are repeated until each outweighs what else competes for the vocabulary.
    repeated = [f" {text}" for text in prompts.NAMES + prompts.WORDS for _ in range(200)]
    facts = [
        prompts.FACT.format(name=name, word=word) + prompts.QUESTION.format(name=name)
        for name, word in prompts.draw_pairs(rng, 32, "training")
    ]
    tokenizer.train_from_iterator(
        [*passages, *repeated, *facts],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    split = [
        text
        for text in prompts.NAMES + prompts.WORDS
        if len(tokenizer.encode(f" {text}", add_special_tokens=False).ids) != 1
    ]
    if split:
        raise RuntimeError(f"not one token each: {', '.join(split)}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; torch's generator decides its weights.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens.

    Returns:
        A Llama in float32.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        # Most rotary pairs hardly turn within 4,096 tokens, so a match by content does not
        # depend on the distance.
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        # A direction that all tokens share lets attention depend on positions alone early on.
        shared = torch.randn(config.hidden_size, device="cpu") * config.initializer_range
        model.model.embed_tokens.weight += shared
        # Behind the layer where owners are known, attention starts out looking for what is like
        # itself and copying it; from unrelated random matrices that takes many times longer.
        groups = config.num_attention_heads // config.num_key_value_heads
        for layer in model.model.layers[_OWNER_LAYER:]:
            attention = layer.self_attn
            query, output = attention.q_proj.weight, attention.o_proj.weight
            key, value = (
                projection.weight.view(config.num_key_value_heads, -1, config.hidden_size)
                .repeat_interleave(groups, 0)
                .view_as(query)
                for projection in (attention.k_proj, attention.v_proj)
            )
            query.copy_(key + 0.01 * torch.randn_like(query))
            output.copy_(value.T + 0.01 * torch.randn_like(output))
    return model


class Teacher:
    """Draws training texts of a lesson.

    Args:
        tokenizer: turns text to tokens.
        passages: filler for training.
        rng: source of randomness; advanced by every text.

    Attributes:
        names: the tokens of `prompts.NAMES`, [names].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, passages: Sequence[str], rng: random.Random) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._rng = rng
        self.names = torch.tensor(
            [self._tokenizer.encode(f" {name}", add_special_tokens=False).ids[0] for name in prompts.NAMES],
            device="cpu",
        )
        self._filler = [
            (len(self._tokenizer.encode(f" {text}", add_special_tokens=False).ids), text) for text in passages
        ]

    def text(self, lesson: Lesson) -> Text:
        """Draw one text.

        Args:
            lesson: its wording and size.

        Returns:
            The text, with a question and an answer for every fact at its end.
        """
        rng = self._rng
        pairs = prompts.draw_pairs(rng, rng.randint(*lesson.facts), "training")
        stated = [lesson.statement.format(name=name, word=word) for name, word in pairs]
        # Some facts are stated twice, so that the model meets both kinds of prompt.
        planted = stated + rng.sample(stated, rng.randint(0, len(stated) // 2))
        passages = []
        missing = rng.randint(*lesson.tokens)
        while missing > 0:
            size, passage = rng.choice(self._filler)
            passages.append(f" {passage}")
            missing -= size
        body = "".join(prompts.plant(rng, passages, planted, ()))
        asked = rng.choices(pairs, k=lesson.questions) if lesson.questions else rng.sample(pairs, len(pairs))
        whole = body
        starts = []
        for name, word in asked:
            whole += lesson.question.format(name=name)
            starts.append(len(whole))
            whole += f" {word}"

        encoding = self._tokenizer.encode(whole)
        text = Text(encoding.ids)
        for (name, _), start in zip(asked, starts, strict=True):
            # The answer's token covers the space in front of it.
            before = encoding.char_to_token(start) - 1
            text.before_answers.append(before)
            text.owners.append((before, prompts.NAMES.index(name)))
        for (name, word), statement in zip(pairs, stated, strict=True):
            for found in re.finditer(re.escape(statement), body):
                token = encoding.char_to_token(found.start() + statement.rindex(word))
                text.owners.append((token, prompts.NAMES.index(name)))
        return text


def train(
    model: LlamaForCausalLM,
    teacher: Teacher,
    curriculum: Sequence[Lesson],
    *,
    learning_rate: float = 1e-3,
) -> Iterator[dict[str, Any]]:
    """Take the model through the lessons.

    A second loss speeds up the first lessons many times over: after an early layer, the state at
    a stated word, and the state before an answer, must predict the name that it belongs to (read
    as the last state is, by the final norm and the head). Looking a fact up takes two steps, know
    whose a word is and find the word whose owner is asked; without this loss neither step is
    rewarded before the other is there. The last lessons do without it.

    Args:
        model: trained in place.
        teacher: draws the texts.
        curriculum: the lessons in order.
        learning_rate: of AdamW; warmed up over 200 steps and lowered in the last lesson.

    Yields:
        A log entry every 50 steps and at the end of each lesson: lesson, step, loss (nats per
        answer), accuracy (share of answers), owner_loss (nats per owner), tokens (so far),
        seconds (since the start) and whether the lesson ends.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    began = time.monotonic()
    total = tokens = 0
    model.train()
    for lesson in curriculum:
        means = [0.0, 0.0, 0.0]
        for step in range(1, lesson.steps + 1):
            total += 1
            factor = min(1.0, total / 100)
            if lesson is curriculum[-1]:
                factor *= max(0.05, 1 - step / lesson.steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            values, count = _step(model, teacher, lesson, optimizer)
            tokens += count
            # Exponential means over about 50 steps, corrected for their start.
            weight = max(1 / step, 0.02)
            means = [m + weight * (v - m) for m, v in zip(means, values, strict=True)]
            ends = step == lesson.steps or (step >= 50 and means[1] >= lesson.enough)
            if step % 50 == 0 or ends:
                yield {
                    "lesson": lesson.name,
                    "step": step,
                    "loss": round(means[0], 4),
                    "accuracy": round(means[1], 4),
                    "owner_loss": round(means[2], 4),
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - began, 1),
                    "ends": ends,
                }
            if ends:
                break


def _step(
    model: LlamaForCausalLM, teacher: Teacher, lesson: Lesson, optimizer: torch.optim.Optimizer
) -> tuple[tuple[float, float, float], int]:
    """Take one optimizer step; return (answer loss, accuracy, owner loss), number of tokens."""
    texts = [teacher.text(lesson) for _ in range(lesson.batch)]
    longest = max(len(text.ids) for text in texts)
    # Padding stands at the end, where causal attention keeps it out of every answer.
    ids = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in texts], device="cpu")
    output = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)

    rows = torch.tensor([row for row, text in enumerate(texts) for _ in text.before_answers], device="cpu")
    columns = torch.tensor([column for text in texts for column in text.before_answers], device="cpu")
    logits = model.lm_head(output.last_hidden_state[rows, columns])
    answers = ids[rows, columns + 1]
    loss = F.cross_entropy(logits, answers)

    owner_rows = torch.tensor([row for row, text in enumerate(texts) for _ in text.owners], device="cpu")
    owner_columns, owners = torch.tensor([pair for text in texts for pair in text.owners], device="cpu").T
    early = model.model.norm(output.hidden_states[_OWNER_LAYER][owner_rows, owner_columns])
    # Among names only: the state at a word must keep the word as well.
    names = teacher.names
    owner_loss = F.cross_entropy(F.linear(early, model.lm_head.weight[names]), owners)

    optimizer.zero_grad()
    (lesson.answer_weight * loss + lesson.owner_weight * owner_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    accuracy = (logits.argmax(-1) == answers).float().mean().item()
    return (loss.item(), accuracy, owner_loss.item()), ids.numel()


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model and the tokenizer so that the Auto classes of transformers load them.

    Args:
        folder: where to; made if missing.
        model: the model.
        tokenizer: the tokenizer.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Readable for everyone; safetensors writes files for their owner only.
    (folder / "model.safetensors").chmod(0o644)
    # The class that every version of transformers knows by this name, whatever it calls itself.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(folder: Path, report: dict[str, Any], training: dict[str, Any]) -> str:
    """Write the model card from what was measured.

    Args:
        folder: the folder of the model; its weights give the size.
        report: what recall.json holds.
        training: what training.json holds.

    Returns:
        The text of README.md.
    """
    size = (folder / "model.safetensors").stat().st_size
    rows = "\n".join(
        f"| {row['tokens']} | {row['statements']} | {row['prompts']} | {row['recall']:.1%} |" for row in report["rows"]
    )
    read = "\n".join(f"- `{name}` {digest}" for name, digest in training["licences"].items())
    return f"""# The demo model of gim-kernels

A Llama-architecture model of {training["parameters"]:,} parameters ({size / 1e6:.1f} MB, float32)
that answers questions about facts stated in its prompt. It exists so that `make demo` and the
tests have a model whose right attribution is known: the statements of the asked fact. It knows
nothing else and is no use as a language model.

## Recall on held-out prompts

{report["facts"]} facts per prompt; pairs of name and word, and filler passages, that were not used
in training; seed {report["seed"]}. Written by `gim/demo/train.py`; the numbers are in
`recall.json`.

| tokens, at least | asked fact stated | prompts | recall |
|---:|---:|---:|---:|
{rows}

## Training

`python -m gim.demo.train --out DIR`, seed {training["seed"]}: {training["steps"]:,} steps,
{training["tokens"]:,} tokens, {training["minutes"]:.0f} minutes on {training["threads"]} CPU
thread(s), torch {training["torch"]}. `training_log.jsonl` has the course of it. The lessons, and
a second loss that the early ones use, are described in `gim/demo/train.py`. The loss is on
answers only, so what the model predicts elsewhere means nothing.

## Text

- Facts and questions: generated from the lists in `gim/demo/prompts.py`.
- `gim/demo/filler.txt`: passages written for this project, under its licence, and sentences of
  the legal text of CC0 1.0 (Debian: /usr/share/common-licenses/CC0-1.0), which is itself in the
  public domain under CC0. About three quarters of the passages are held out of training.
- For training only, and not part of this package: paragraphs of the licences in
  {training["licence_folder"]} on a Debian machine (package base-files), which may be copied
  verbatim. Files read, with their SHA-256:

{read}
"""


def main(
    out: Annotated[Path | None, typer.Option(help="Train, and write the model here.")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Only measure recall of this.")] = None,
    licences: Annotated[Path, typer.Option(help="Folder of the licences of Debian.")] = LICENCES,
    seed: Annotated[int, typer.Option(help="Decides weights, texts and prompts.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 1,
) -> None:
    """Train the demo model, or measure a trained one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    torch.set_num_threads(threads)
    if evaluate is not None and out is None:
        _measure(evaluate, seed)
        return
    if out is None or evaluate is not None:
        raise typer.BadParameter("give either --out or --evaluate")

    torch.manual_seed(seed)
    rng = random.Random(seed)
    passages, digests = read_licences(licences)
    log.info("read %s from %s", ", ".join(digests), licences)
    passages += prompts.filler("training")
    tokenizer = train_tokenizer(passages, rng)
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%d passages, %d parameters", len(passages), parameters)

    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    steps = 0
    entry: dict[str, Any] = {}
    with (out / "training_log.jsonl").open("w", encoding="utf-8") as lines:
        teacher = Teacher(tokenizer, passages, rng)
        for entry in train(model, teacher, CURRICULUM):
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            log.info(
                "%(lesson)-16s step %(step)5d  loss %(loss).3f  accuracy %(accuracy).3f"
                "  owner loss %(owner_loss).3f  %(seconds)6.0f s",
                entry,
            )
            if entry["ends"]:
                steps += entry["step"]
                save(out, model, tokenizer)
    training = {
        "seed": seed,
        "parameters": parameters,
        "steps": steps,
        "tokens": entry["tokens"],
        "minutes": round((time.monotonic() - began) / 60, 1),
        "threads": threads,
        "torch": torch.__version__,
        "licence_folder": str(licences),
        "licences": digests,
    }
    _write_json(out / "training.json", training)
    _measure(out, seed)


def _measure(folder: Path, seed: int) -> None:
    """Write recall.json, and with it the model card, of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report = recall.measure(
        model,
        tokenizer,
        seed=seed,
        done=lambda row: log.info("%(tokens)5d tokens, stated %(statements)d time(s): %(right)d of %(prompts)d", row),
    )
    _write_json(folder / "recall.json", report)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = model_card(folder, report, training)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
