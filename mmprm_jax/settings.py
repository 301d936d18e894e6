"""Every setting of a run: name, type, default, meaning and what is allowed. Config files say only what differs.

``Config`` is the whole; a stage's section is made of the parts that its components take (``Sampling``, ``Search``,
``Trainer``, ``Labels``, ...). Nothing heavy is imported here: wrong settings are found at once. That the names listed
here are those that there are is tested.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from collections.abc import Iterator

from mmprm_jax.schema import Found, Section, setting

DTYPES = ("float32", "bfloat16")
EXAMPLES = ("default", "paper")
FREEZABLE = ("vision", "projector", "decoder")  # parts of every model of ours
LABELS = ("soft", "hard", "beta_binomial")
OPTIMIZERS = ("adamw", "adafactor", "muon")
REMAT = ("none", "full", "attention", "dots", "dots_no_batch")
SEARCHES = ("default", "paper", "flat")
STEPS = ("tags", "structure", "auto")
TEMPLATES = ("plain", "internvl", "paper")
CONTINUE = "continue"  # a template of servers only
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

LARGE = 10**15  # of counts that nothing is allocated for
MAX_EXPRESSIONS = 10**6  # there are 1.6 million without a bracket, and drawing the last ones would take for ever


@dataclasses.dataclass(frozen=True)
class Digits(Section):
    """The sizes of the embedded problem set."""

    train: int = setting(1600, "problems to search", low=1)
    dev: int = setting(300, "problems to choose the aggregator on", low=1)
    test: int = setting(600, "problems to report on", low=1)
    demonstrations: int = setting(6000, "images with a (partly wrong) solution", low=1)
    transcriptions: int = setting(4000, "images to read, without a solution", low=0)
    text_only: int = setting(8000, "arithmetic posed as text", low=0)
    habit: float = setting(0.5, "probability that a wrong habit is followed where it applies", low=0, high=1)
    bracket: float = setting(0.7, "probability that an expression has a bracket", low=0, high=1)

    def rules(self) -> Iterator[Found]:
        counts = (self.train, self.dev, self.test, self.demonstrations, self.transcriptions, self.text_only)
        if sum(counts) > MAX_EXPRESSIONS:
            yield "train", f"{sum(counts):,} expressions in all; there are at most {MAX_EXPRESSIONS:,} to draw"


@dataclasses.dataclass(frozen=True)
class Data(Digits):
    """Where the problems come from."""

    folder: str = setting("", "a folder with {train,dev,test,sft}.jsonl; empty: the digits are generated")
    vocab: int = setting(4096, "tokens of the tokenizer made for a folder without tokenizer.json", low=269)


@dataclasses.dataclass(frozen=True)
class Vision(Section):
    """The tower of a model that is trained from scratch."""

    image_size: int = setting(24, "pixels per side of an image tile", low=1)
    patch_size: int = setting(4, "pixels per side of a patch", low=1)
    hidden_size: int = setting(64, "size of the residual stream", low=1)
    num_layers: int = setting(2, "layers", low=1)
    num_heads: int = setting(4, "attention heads", low=1)
    intermediate_size: int = setting(128, "hidden units of the MLPs", low=1)
    layer_norm_eps: float = setting(1e-6, "epsilon of the norms", above=0)
    layer_scale_init: float = setting(1.0, "initial scale of the residual branches")
    drop_path: float = setting(0.0, "stochastic depth: rate of the last layer's branches", low=0, high=0.99)

    def rules(self) -> Iterator[Found]:
        if self.num_heads > 0 and self.hidden_size % self.num_heads:
            yield "num_heads", f"{self.num_heads} do not divide hidden_size {self.hidden_size}"
        if self.patch_size > 0 and self.image_size % self.patch_size:
            yield "patch_size", f"{self.patch_size} does not divide image_size {self.image_size}"


@dataclasses.dataclass(frozen=True)
class Decoder(Section):
    """The decoder of a model that is trained from scratch."""

    hidden_size: int = setting(64, "size of the residual stream", low=1)
    num_layers: int = setting(6, "layers", low=1)
    num_heads: int = setting(4, "attention heads", low=1)
    num_kv_heads: int = setting(2, "key/value heads", low=1)
    head_dim: int = setting(16, "size of a head", low=2)
    intermediate_size: int = setting(128, "hidden units of the MLPs", low=1)
    rms_norm_eps: float = setting(1e-5, "epsilon of the norms", above=0)
    rope_theta: float = setting(1e4, "base of the rotary positions", above=0)

    def rules(self) -> Iterator[Found]:
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"{self.num_kv_heads} do not divide num_heads {self.num_heads}"
        if self.head_dim % 2:
            yield "head_dim", f"{self.head_dim} is odd; rotary positions turn pairs of units"


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """A model that is trained from scratch; of ``policy`` only ``remat`` counts."""

    vision: Vision = Vision()
    decoder: Decoder = Decoder()
    downsample: int = setting(2, "pixel shuffle: so many patches per side become one visual token", low=1)
    remat: str = setting("none", "rematerialisation: what the backward pass recomputes", choices=REMAT)

    def rules(self) -> Iterator[Found]:
        patches = self.vision.image_size // max(1, self.vision.patch_size)
        if self.downsample > 0 and (patches % self.downsample or not patches):
            yield "downsample", f"{self.downsample} does not divide the {patches} patches per side of a tile"


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
    """How gradients become updates."""

    name: str = setting("adamw", "the optimizer", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-3, "peak of the learning rate", above=0)
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises", low=0, high=1)
    weight_decay: float = setting(0.01, "of matrices, scaled by the learning rate", low=0)
    clip: float = setting(1.0, "global norm to which gradients are clipped", above=0)
    moments: str = setting("float32", "dtype of the moments of adamw and muon between steps", choices=DTYPES)


@dataclasses.dataclass(frozen=True)
class Trainer(Section):
    """What the training loop takes."""

    steps: int = setting(1000, "updates", low=0)
    batch_size: int = setting(64, "rows of a step, over all processes", low=1)
    optimizer: Optimizer = Optimizer()
    microbatches: int = setting(1, "gradient accumulation: parts of a batch, one after another", low=1)
    dtype: str = setting("float32", "of forward and backward passes; weights and sums are float32", choices=DTYPES)
    freeze: tuple[str, ...] = setting((), "frozen parts of the model: first parts of parameter paths")
    checkpoint_every: int = setting(100, "steps between two checkpoints", low=1)
    keep: int = setting(2, "newest checkpoints kept on disk", low=1)
    keep_best: int = setting(0, "checkpoints of the lowest loss kept beside them", low=0)
    log_every: int = setting(10, "steps between two rows of metrics.jsonl", low=1)

    def rules(self) -> Iterator[Found]:
        if self.microbatches > 0 and self.batch_size % self.microbatches:
            yield "microbatches", f"{self.microbatches} do not divide the {self.batch_size} rows of batch_size"
        warmup = self.optimizer.warmup
        if self.steps > 0 and 0 <= warmup <= 1 and max(1, round(warmup * self.steps)) >= self.steps:
            yield "steps", f"{self.steps} with optimizer.warmup {warmup}: no step is left after the warm-up"


@dataclasses.dataclass(frozen=True)
class Training(Trainer):
    """A training stage: the loop, and what its rows are made of."""

    shift: int = setting(0, "augmentation: pixels by which an image is moved at most", low=0)
    noise: float = setting(0.0, "augmentation: standard deviation, of pixels 0-255", low=0)
    max_length: int = setting(1024, "tokens of a row; longer examples are left out", low=2)
    row_examples: int = setting(1, "examples packed into a row at most; 1: no packing", low=1)
    row_tiles: int = setting(1, "image tiles of a row at most", low=0)
    lora_rank: int = setting(0, "rank of LoRA adapters of the decoder, whose matrices are frozen; 0: none", low=0)
    lora_alpha: float = setting(16.0, "LoRA: the adapters' output is scaled by alpha / rank", above=0)

    def freezable(self) -> tuple[str, ...]:
        """The first parts of the names that ``freeze`` may hold."""
        return FREEZABLE

    def rules(self) -> Iterator[Found]:
        yield from super().rules()
        for name in self.freeze:
            if name.partition("/")[0] not in self.freezable():
                yield "freeze", f"{name!r} is no part of the model, which has {', '.join(self.freezable())}"
        if set(FREEZABLE) <= set(self.freeze) and not self.lora_rank:
            yield "freeze", "nothing is left to train; take a part out, or set lora_rank"


@dataclasses.dataclass(frozen=True)
class SFT(Training):
    """Supervised fine-tuning of the policy; ``steps`` 0 leaves it as it is."""

    files: tuple[str, ...] = setting(("sft.jsonl",), "demonstrations in the data's folder")
    weights: tuple[float, ...] = setting((), "sampling weight of each file; empty: by its length", above=0)

    def rules(self) -> Iterator[Found]:
        yield from super().rules()
        if not self.files or not all(self.files):
            yield "files", f"{self.files!r}: name at least one file, and no empty name"
        if self.weights and len(self.weights) != len(self.files):
            yield "weights", f"{len(self.weights)} for {len(self.files)} files; give one for each, or none"


@dataclasses.dataclass(frozen=True)
class Labels(Section):
    """Which solutions of a tree become examples."""

    max_paths: int = setting(16, "solutions per problem", low=1)
    balance: bool = setting(False, "as many solutions ending right as ending wrong")

    def rules(self) -> Iterator[Found]:
        if self.balance and self.max_paths == 1:
            yield "max_paths", "1 with balance, which needs at least 2"


@dataclasses.dataclass(frozen=True)
class TrainPRM(Labels, Training):
    """Step labels from the trees, from files or both, and the training of the PRM."""

    trees: bool = setting(True, "step labels of the run's trees; false: of the files alone")
    files: tuple[str, ...] = setting((), "step labels that mmprm prepare wrote: in the data's folder, or whole paths")
    weights: tuple[float, ...] = setting((), "of the trees, then of each file: sampling; empty: by length", above=0)
    mode: str = setting("default", "paper: one label per node, all steps of a right rollout right", choices=EXAMPLES)
    label: str = setting("soft", "k / n; hard: is k / n above the threshold; beta_binomial: k of n", choices=LABELS)
    threshold: float = setting(0.0, "of hard labels, on k / n", low=0, high=1)

    @property
    def needs_kappa(self) -> bool:
        """Whether the labels need a head for their concentration."""
        return self.label == "beta_binomial"

    def freezable(self) -> tuple[str, ...]:
        return (*FREEZABLE, "kappa") if self.needs_kappa else FREEZABLE

    def rules(self) -> Iterator[Found]:
        yield from super().rules()
        yield from Training.rules(self)
        if self.steps == 0:
            yield "steps", "0 is not allowed; a PRM has to be trained"
        if not all(self.files):
            yield "files", f"{self.files!r}: no empty name"
        sources = self.trees + len(self.files)
        if not sources:
            yield "trees", "none, and no files: name a file of step labels"
        if sources and self.weights and len(self.weights) != sources:
            trees = "the trees and " if self.trees else ""
            yield "weights", f"{len(self.weights)} for {trees}{len(self.files)} files; give one for each, or none"


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How tokens are drawn. Repetition penalty, temperature, top-k, top-p, min-p apply in this order."""

    temperature: float = setting(1.0, "of the softmax; 0: greedy", low=0)
    top_k: int = setting(0, "only the k most likely tokens; 0: all", low=0)
    top_p: float = setting(1.0, "the smallest set of tokens with this share of what top_k left", above=0, high=1)
    min_p: float = setting(0.0, "tokens at least this likely relative to the most likely one", low=0, high=1)
    repetition_penalty: float = setting(1.0, "divides positive logits of tokens seen before", above=0)
    max_new_tokens: int = setting(128, "tokens of a sample at most", low=1)


@dataclasses.dataclass(frozen=True)
class Search(Section):
    """The constants of the tree search; defaults: the paper's."""

    num_rollouts: int = setting(16, "rollouts per estimated prefix", low=2)
    max_searches: int = setting(200, "binary searches per tree", low=0, high=LARGE)
    rollout_budget: int = setting(1000, "no search starts once this many rollouts are used", low=0, high=LARGE)
    c_puct: float = setting(0.125, "weight of the exploration term", low=0)
    alpha: float = setting(0.5, "prefers rollouts from prefixes that are mostly right", above=0)
    beta: float = setting(0.9, "prefers short rollouts", above=0)
    length_scale: float = setting(500.0, "of beta, in sampled tokens; in words in mode paper", above=0)
    right_solutions: int = setting(0, "right solutions per tree whose every prefix is estimated at the end", low=0)
    flat_solutions: int = setting(4, "mode flat: solutions per problem whose every prefix is estimated", low=1)


@dataclasses.dataclass(frozen=True)
class Engine(Section):
    """How the policy's samples share the devices and processes; nothing of it changes a result."""

    slots: int = setting(512, "samples decoded at a time", low=1)
    cache_tokens: int = setting(50_000, "prefix tokens kept on the devices", low=1)
    verify_workers: int = setting(1, "processes that verify answers; 0: none beside this one", low=0, high=4096)
    dtype: str = setting("", "of the weights; empty: as stored", choices=("", *DTYPES))


@dataclasses.dataclass(frozen=True)
class Reading(Section):
    """How the policy's solutions are read."""

    steps: str = setting(
        "tags", "steps by <step> tags; structure: by headings, numbers, paragraphs; auto: by tags if any", choices=STEPS
    )
    max_unread: float = setting(
        0.5, "stop if a larger share of the first rollouts has no steps or no answer; 1: never", low=0, high=1
    )
    unread_after: int = setting(256, "rollouts after which max_unread is looked at, or at the end", low=1)


@dataclasses.dataclass(frozen=True)
class Annotate(Reading, Engine, Sampling, Search):
    """A search tree for every training problem."""

    mode: str = setting("default", "paper: the original's search, quirks included; flat: none", choices=SEARCHES)
    policy: str = setting("", "another checkpoint, or the model's name on the servers; empty: this run's policy")
    template: str = setting(
        "", "prompts of a released policy; empty: internvl, or continue on servers", choices=("", *TEMPLATES, CONTINUE)
    )
    servers: tuple[str, ...] = setting((), "addresses of OpenAI-compatible servers; empty: our own engine")
    concurrency: int = setting(64, "open requests at each server", low=1)
    lockstep: bool = setting(False, "several processes: one model over all their devices, not one in each")
    in_flight: int = setting(512, "trees that grow at the same time", low=1)
    trees_per_shard: int = setting(50, "trees per file", low=1)
    checkpoint_seconds: float = setting(30.0, "seconds between two saves of the trees in flight", low=0)
    skip_failed: bool = setting(False, "go on without problems whose tree failed")

    def rules(self) -> Iterator[Found]:
        for address in self.servers:
            if not _is_address(address):
                shown = address.rpartition("@")[2]  # what stands before it may be a password
                yield "servers", f"{shown!r} is no address such as http://host:8000/v1"
        if self.servers and not self.policy:
            yield "policy", "is empty; it names the model that the servers have"
        if self.mode == "paper" and self.steps != "tags":
            yield "steps", f"{self.steps!r} is not for mode paper, which reads <step> tags as the original does"
        if self.template == CONTINUE and not self.servers:
            yield "template", f"{CONTINUE!r} is for servers only; choose {', '.join(TEMPLATES)}"


def _is_address(text: str) -> bool:
    try:
        url = urllib.parse.urlsplit(text)
        known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    return known and not (url.username or url.password or url.query or url.fragment or any(map(str.isspace, text)))


@dataclasses.dataclass(frozen=True)
class Evaluate(Reading, Engine, Sampling):
    """Candidates of dev and test problems, their scores and figures."""

    n: int = setting(16, "candidates per problem", low=1)
    score_rows: int = setting(256, "solutions that the PRM scores at a time, roughly", low=1)
    calibration_problems: int = setting(100, "test problems of which one solution is estimated step by step", low=0)
    calibration_rollouts: int = setting(16, "rollouts per step", low=1)


@dataclasses.dataclass(frozen=True)
class Guided(Section):
    """``mmprm guide``; its sampling is that of ``evaluate``."""

    beams: int = setting(16, "continuations of a problem that are scored in a round", low=1)
    width: int = setting(4, "continuations of each solution that goes on", low=1)
    ahead: int = setting(1, "lookahead steps", low=0)
    depth: int = setting(16, "steps of a solution at most", low=1)

    def rules(self) -> Iterator[Found]:
        if self.width > 0 and self.beams % self.width:
            yield "width", f"{self.width} does not divide the {self.beams} beams"


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """All settings of a run."""

    seed: int = setting(0, "of all random numbers", low=0, high=2**32 - 1)
    mesh: tuple[int, ...] = setting((-1, 1, 1), "devices along data, fsdp, tensor; -1: all remaining devices", low=-1)
    policy: str = setting("", "a released or converted checkpoint to begin with: folder or hub id; empty: none")
    max_tiles: int = setting(1, "tiles per image, in all stages", low=1, high=256)
    data: Data = Data()
    model: Model = Model()
    sft: SFT = SFT()
    annotate: Annotate = Annotate()
    train_prm: TrainPRM = TrainPRM()
    evaluate: Evaluate = Evaluate()
    guided: Guided = Guided()

    def rules(self) -> Iterator[Found]:
        if len(self.mesh) != 3 or 0 in self.mesh or self.mesh.count(-1) > 1:
            yield "mesh", f"{self.mesh} must be three sizes (data, fsdp, tensor) above 0, one of which may be -1"
        if self.sft.steps == 0 and not (self.policy or self.annotate.policy):
            yield "sft.steps", "0: name the policy to use as it is, --config.policy=FOLDER_OR_HUB_ID"
