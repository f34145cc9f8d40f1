"""Trainers that finish in a second: hidden 32, 2 layers, from config; also a program that the fault tests kill.

``python pico_trainers.py KIND FOLDER [key=value ...]`` trains, resuming when there is something to resume from, and
writes the final weights to ``FOLDER/final.safetensors``. ``python pico_trainers.py serve`` does that for each line it
reads, in a fork that costs no imports.
"""

import atexit
import functools
import os
import random
import signal
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from soju.core.errors import UserError
from soju.training.checkpoints import list_checkpoints
from soju.training.reliable import ReliableTrainer
from soju.training.sampling import LengthBuckets

WORDS = [f"w{number}" for number in range(60)]
ROWS = 38
"""With batch 4 and accumulation 2: 10 batches and 5 steps an epoch, the last one with batches of 4 and 2."""


class PlainTrainer(ReliableTrainer, Trainer):
    pass


class SparseTrainer(ReliableTrainer, SparseEncoderTrainer):
    pass


def pico_tokenizer():
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def pico_bert():
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=65,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(config)


def texts():
    generator = random.Random(3)
    return [" ".join(generator.choices(WORDS, k=generator.randint(2, 8))) for _ in range(ROWS)]


class TwoTerms(nn.Module):
    """Weighted terms for the trainer, raw ones beside them. One parameter of its own: a temperature."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.loss_components = {}

    def forward(self, features, labels):
        first_BV, second_BV = (self.model(feature)["sentence_embedding"] for feature in features)
        distance_B = (first_BV - second_BV).square().sum(1) * self.temperature
        flops = first_BV.mean(0).square().sum()
        self.loss_components = {"distance": distance_B.detach(), "flops": flops.detach()}
        return {"distance": distance_B.mean(), "flops": 5e-5 * flops}


COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "logging_steps": 2,
    "save_steps": 4,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def plain_trainer(folder, *, extra=None, **settings):
    tokenizer = pico_tokenizer()
    rows = [dict(tokenizer(text)) for text in texts()]
    return PlainTrainer(
        model=pico_bert(),
        args=TrainingArguments(output_dir=str(folder / "checkpoints"), **{**COMMON, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
        processing_class=tokenizer,
        history=folder / "history.jsonl",
        **(extra or {}),
    )


def sparse_model(folder):
    source = folder / f"start{os.environ.get('RANK', '')}"
    if not (source / "config.json").exists():
        pico_bert().save_pretrained(source)
        pico_tokenizer().save_pretrained(source)
    torch.manual_seed(2)
    transformer = Transformer(str(source), transformer_task="fill-mask")
    return SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu")


def sparse_trainer(folder, *, extra=None, loss=TwoTerms, **settings):
    model = sparse_model(folder)
    rows = texts()
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        batch_sampler=LengthBuckets(lambda row: len(row["a"].split()), window=2),
        **{**COMMON, **settings},
    )
    return SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"a": rows, "b": rows[::-1]}),
        loss=loss(model),
        history=folder / "history.jsonl",
        **(extra or {}),
    )


class NoParameters(TwoTerms):
    """Several ranks train only parameters of the model."""

    def __init__(self, model):
        super().__init__(model)
        self.temperature.requires_grad_(False)


TRAINERS = {
    "plain": plain_trainer,
    "sparse": sparse_trainer,
    "ranks": functools.partial(sparse_trainer, loss=NoParameters),
}


def weights(trainer):
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    own = getattr(getattr(trainer, "loss", None), "temperature", None)
    return state if own is None else {**state, "temperature": own.detach().clone()}


def train_to_the_end(kind, folder, *settings):
    torch.set_num_threads(1)
    values = dict(setting.split("=") for setting in settings)
    rank = int(os.environ.get("RANK", 0))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"process-{rank}").write_text(str(os.getpid()))
    die_at_operation(int(values.pop("die_at", 0)), folder)
    trainer = TRAINERS[kind](folder, **{key: int(value) for key, value in values.items()})
    trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
    save_file(weights(trainer), folder / f"final{rank or ''}.safetensors")


def die_at_operation(number, folder):
    """Kill this process at its n-th operation on files; 0 only counts them, into ``FOLDER/operations``."""
    count = 0

    def counted(operation):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapper

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (torch, "save")):
        setattr(module, name, counted(getattr(module, name)))
    atexit.register(lambda: (folder / "operations").write_text(str(count)))


def main(arguments):
    try:
        train_to_the_end(arguments[0], Path(arguments[1]), *arguments[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def serve():
    """Answer each line of arguments with the process id of the fork, and with its exit code when it ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            try:
                code = main(line.split())
                atexit._run_exitfuncs()
                os._exit(code)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "serve" else main(sys.argv[1:]))
