"""The embedded default: handwritten arithmetic, from nothing to a report on two CPU cores.

``digits.py`` is the run that makes claims; ``digits.py:smoke`` walks the same path in a minute or two and makes none.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"digits.py takes no argument or :smoke, not :{arg}")
    config = ConfigDict()
    config.seed = 0
    config.mesh = (-1, 1, 1)  # devices along data, fsdp, tensor; -1: what is left

    config.policy = ""  # a released checkpoint (folder, hub id, mmprm convert's) to begin with; "": random weights
    config.max_tiles = 1  # of one image, in all stages

    config.data = ConfigDict()
    config.data.folder = ""  # a folder with {train,dev,test,sft}.jsonl; "": generate the digits
    config.data.vocab = 4096  # tokens of the tokenizer that is made for a folder without tokenizer.json
    config.data.train = 1600
    config.data.dev = 300
    config.data.test = 600
    config.data.demonstrations = 6000
    config.data.transcriptions = 4000
    config.data.text_only = 8000
    config.data.habit = 0.5
    config.data.bracket = 0.7

    config.model = ConfigDict()
    config.model.vision = ConfigDict(
        dict(image_size=24, patch_size=4, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
             layer_norm_eps=1e-6, layer_scale_init=1.0, drop_path=0.0)
    )  # fmt: skip
    config.model.decoder = ConfigDict(
        dict(hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
             rms_norm_eps=1e-5, rope_theta=1e4)
    )  # fmt: skip
    config.model.downsample = 2
    config.model.remat = "none"  # what the backward pass computes once more: full, attention, dots, dots_no_batch

    config.sft = ConfigDict()
    config.sft.files = ("sft.jsonl",)  # in the data's folder
    config.sft.weights = ()  # the share of each file in the training, e.g. 3.0,1.0; (): as they are long
    config.sft.steps = 900  # 0: the policy as it is
    config.sft.batch_size = 64
    config.sft.optimizer = ConfigDict(
        dict(name="muon", learning_rate=1e-2, warmup=0.05, weight_decay=0.01, clip=1.0, moments="float32")
    )
    config.sft.microbatches = 1  # parts of a batch that follow one another on the devices
    config.sft.dtype = "float32"  # or bfloat16: of forward and backward passes; the weights' own is float32
    config.sft.freeze = ()  # parts of the model that stay as they are, e.g. ("vision",)
    config.sft.shift = 1  # augmentation: pixels
    config.sft.noise = 8.0  # augmentation: standard deviation, 0-255
    config.sft.max_length = 52  # tokens of a row; longer examples are left out
    config.sft.row_examples = 1  # examples packed into a row, at most; 1: no packing
    config.sft.row_tiles = 1  # image tiles of a row, at most
    config.sft.lora_rank = 0  # of adapters beside the decoder's matrices, which stay as they are; 0: none
    config.sft.lora_alpha = 16.0
    config.sft.checkpoint_every = 100
    config.sft.keep = 2  # newest checkpoints on disk
    config.sft.keep_best = 0  # and those of the lowest loss
    config.sft.log_every = 10

    config.annotate = ConfigDict()
    config.annotate.mode = "default"  # or paper: the original's search, quirks included; or flat: no search
    config.annotate.policy = ""  # another released checkpoint, or the model's name on the servers; "": this run's
    config.annotate.template = ""  # how a released one is asked; "": internvl, or continue on servers; or paper
    config.annotate.dtype = ""  # of its weights; "": as stored
    config.annotate.servers = ()  # addresses of OpenAI-compatible servers; (): our own engine
    config.annotate.concurrency = 64  # requests under way at each server
    config.annotate.lockstep = False  # several processes: one model over all their devices, not one in each
    config.annotate.num_rollouts = 8
    config.annotate.max_searches = 12
    config.annotate.rollout_budget = 80
    config.annotate.c_puct = 0.125
    config.annotate.alpha = 0.5
    config.annotate.beta = 0.9
    config.annotate.length_scale = 500.0
    config.annotate.right_solutions = 2
    config.annotate.flat_solutions = 4  # mode flat only
    config.annotate.temperature = 0.7
    config.annotate.top_k = 50
    config.annotate.top_p = 0.9
    config.annotate.min_p = 0.0
    config.annotate.repetition_penalty = 1.0
    config.annotate.max_new_tokens = 40
    config.annotate.slots = 512  # rollouts decoded at a time
    config.annotate.in_flight = 512  # trees
    config.annotate.cache_tokens = 200_000  # prefix tokens kept on the devices
    config.annotate.verify_workers = 1  # processes
    config.annotate.trees_per_shard = 50
    config.annotate.checkpoint_seconds = 30.0  # between two saves of the trees in flight
    config.annotate.skip_failed = False  # go on without problems whose tree failed

    config.train_prm = ConfigDict()
    config.train_prm.mode = "default"  # or paper: one label per tree node, all steps of a right rollout are right
    config.train_prm.label = "soft"  # soft: k / n; hard: 1 where k / n > threshold; beta_binomial: k of n
    config.train_prm.threshold = 0.0
    config.train_prm.max_paths = 16  # solutions per problem
    config.train_prm.balance = False
    config.train_prm.steps = 550
    config.train_prm.batch_size = 64
    config.train_prm.optimizer = ConfigDict(
        dict(name="muon", learning_rate=4e-3, warmup=0.05, weight_decay=0.01, clip=1.0, moments="float32")
    )
    config.train_prm.microbatches = 1
    config.train_prm.dtype = "float32"
    config.train_prm.freeze = ()
    config.train_prm.shift = 1
    config.train_prm.noise = 8.0
    config.train_prm.max_length = 60  # tokens of a row; longer examples are left out
    config.train_prm.row_examples = 1  # examples packed into a row, at most; 1: no packing
    config.train_prm.row_tiles = 1  # image tiles of a row, at most
    config.train_prm.lora_rank = 0
    config.train_prm.lora_alpha = 16.0
    config.train_prm.checkpoint_every = 100
    config.train_prm.keep = 2
    config.train_prm.keep_best = 0
    config.train_prm.log_every = 10

    config.evaluate = ConfigDict()
    config.evaluate.n = 16
    config.evaluate.temperature = 0.7
    config.evaluate.top_k = 50
    config.evaluate.top_p = 0.9
    config.evaluate.max_new_tokens = 40
    config.evaluate.slots = 512
    config.evaluate.cache_tokens = 50_000
    config.evaluate.dtype = ""  # of the weights; "": as stored
    config.evaluate.verify_workers = 1  # processes
    config.evaluate.score_rows = 256
    config.evaluate.calibration_problems = 100  # test problems; of each one solution, estimated behind every step
    config.evaluate.calibration_rollouts = 16  # per step

    config.guided = ConfigDict()  # mmprm guide; the sampling is evaluate's
    config.guided.beams = 16  # continuations of a problem that are scored in a round
    config.guided.width = 4  # continuations of each solution that goes on
    config.guided.ahead = 1  # steps of the look ahead
    config.guided.depth = 16  # steps of a solution, at most

    if arg == "smoke":
        config.data.update(train=64, dev=16, test=32, demonstrations=256, transcriptions=256, text_only=256)
        config.model.decoder.num_layers = 2
        config.sft.update(steps=60, checkpoint_every=20)
        config.annotate.update(
            num_rollouts=4, max_searches=4, rollout_budget=24, slots=64, in_flight=32, trees_per_shard=16
        )
        config.train_prm.update(steps=40, checkpoint_every=20)
        config.evaluate.update(slots=64, score_rows=64, calibration_problems=8, calibration_rollouts=8)
    return config
