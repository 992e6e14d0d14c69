"""Every key that exists, its default, its unit and why: the reference page of the configuration.

A config of one's own calls this get_config and changes the lines that differ; on the command line
`--config.train.steps=100` does the same. Lengths are in tokens, widths in numbers, sizes in bytes
where said so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"  # names the run; the default workdir is runs/<name>
    c.seed = 0  # of the initial weights, the order of the data and dropout

    c.task = ConfigDict()
    c.task.name = "text"  # a row of fastformer.tasks.TASKS; its own fields go beside it

    c.data = ConfigDict()
    # python_docs, kjv, files:path/*.txt (.gz too) and tfds:lm1b are text too; the probes take synthetic,
    # digits takes digits, translate takes libreoffice_help:de and gettext:locale/de/**/*.mo,
    # qa and answer take python_questions; tfds: has what any of them needs, as in tfds:squad/v2.0.
    c.data.source = "python_code"
    c.data.directory = ""  # prepared data; "" is $FASTFORMER_DATA or ~/.cache/fastformer
    c.data.tokeniser = "bytes"  # or bpe, trained on the train split and kept with the run; run:DIR is DIR's
    c.data.vocabulary = 4096  # tokens of a bpe tokeniser; bytes always has 257
    c.data.length = 256  # T: tokens a row; documents are packed and cut to it

    c.model = ConfigDict()
    c.model.name = "decoder"  # a row of fastformer.models.MODELS: what the task needs
    c.model.layers = 4  # L: blocks
    c.model.width = 256  # D: of the residual stream
    c.model.heads = 4  # H: query heads
    c.model.kv_heads = 0  # G: key/value heads; 0 is as many as heads (MHA), 1 is MQA, between is GQA
    c.model.head_width = 0  # K = P: of one head; 0 is width / heads
    c.model.ff_width = 0  # F: hidden neurons of the MLP; 0 is 4 width (gelus) or 8/3 width (swiglu)
    c.model.norm = "rms"  # or layer
    c.model.norm_epsilon = 0.0  # added to what a norm divides by the root of; 0 is 1e-6 (rms), 1e-5 (layer)
    c.model.norm_placement = "pre"  # norms before each branch and at the end; post is after each joined it
    c.model.embedding_norm = False  # a norm of the embedding too, before the first block
    c.model.token_types = 0  # an encoder's kinds of tokens with a vector each, as BERT's two sentences
    c.model.mlp = "swiglu"  # or gelu (by tanh), gelu_erf (exact)
    c.model.bias = False  # the linear maps of mixers and MLPs have biases
    c.model.positions = "rope"  # or alibi, sinusoidal, learned, none
    c.model.rope_base = 10000.0  # wavelength of the slowest pair, in units of 2 pi tokens
    c.model.qk_norm = False  # RMS-normalise queries and keys per head
    c.model.soft_cap = 0.0  # scores are soft_cap * tanh(scores / soft_cap); 0 is off
    c.model.short_conv = -1  # tokens a convolution of q, k, v spans; 0 is off, -1 as the mixer's paper has it
    c.model.output_gate = False  # multiply what the mixer returns by a sigmoid gate of its input
    c.model.tied = True  # embedding and output head share one matrix
    c.model.dropout = 0.0  # rate on each branch before it joins the residual stream
    c.model.dtype = "float32"  # or bfloat16, float16, fp8: of activations; weights, norms, states are float32
    c.model.implementation = "auto"  # or reference (the papers' equations), xla, pallas, cudnn: tried first
    c.model.remat = ("none",)  # or full, dots (keep matrix products): what a block computes again; repeats
    c.model.scan = False  # one compiled body for all repeats of the pattern: compiles as fast as one repeat
    c.model.loss_chunk = 0  # tokens of a row whose logits exist at once in training; 0 is all of them
    c.model.pattern = ()  # mixers by layer, repeated: ("local", "local", "softmax"); () is attention.name
    c.model.bidirectional = False  # an encoder's tokens see those after them too
    c.model.prefix_lm = False  # a decoder's tokens of a source see all of it, those after them too (softmax)
    c.model.encoder_layers = 0  # blocks of the encoder of an encoder_decoder
    c.model.encoder_pattern = ()  # its mixers by layer, which see in both directions; () is those above
    c.model.attention = ConfigDict()
    c.model.attention.name = "softmax"  # a row of fastformer.attention.VARIANTS; its own fields go beside it

    c.train = ConfigDict()
    c.train.steps = 1000  # optimiser steps of the whole run; 0 only compresses what train.init holds
    c.train.batch = 32  # B: rows a step, over all devices
    c.train.accumulate = 1  # parts of the batch that go through the model one after another
    c.train.precision = ()  # (("fp8", 3), ("bfloat16", 1)): policies and their shares; () is model.dtype
    c.train.precision_cycles = 1  # times that a run goes through them
    c.train.spike = 0.0  # a loss so many deviations above its average is skipped; 0 is off (NaN always is)
    c.train.bad_steps = 5  # skipped in a row before a run goes back to its last good checkpoint, past the bad
    c.train.rollbacks = 3  # times that it may go back
    c.train.init = ""  # workdir of a finished run whose weights are the first, cut or merged where larger
    c.train.init_layers = "even"  # or change: which of its layers, where this model has fewer

    c.optimiser = ConfigDict()
    c.optimiser.name = "adamw"  # or muon (hidden matrices; the rest by AdamW), lion, adafactor
    c.optimiser.learning_rate = 3e-3  # at the top of the schedule
    c.optimiser.schedule = "cosine"  # or linear, wsd (warm-up, stable, decay), constant: after the warm-up
    c.optimiser.warmup_steps = 100  # linear from 0
    c.optimiser.decay_steps = 0  # last steps in which wsd comes down; 0 is a fifth of those after the warm-up
    c.optimiser.final_fraction = 0.1  # down to this fraction of the top
    c.optimiser.b1 = 0.9  # decay of the first moment (adafactor: 0 is without one, as published)
    c.optimiser.b2 = 0.95  # decay of the second moment (adafactor: the most it rises to)
    c.optimiser.weight_decay = 0.1  # on matrices only: neither norms, biases nor gates
    c.optimiser.clip = 1.0  # global gradient norm; 0 is off
    c.optimiser.groups = ()  # (("layer_0/", 0.1, None),): (path regex, times the rate, weight decay or None)
    c.optimiser.average = 0.0  # decay of an average of the weights, which is then what is evaluated; 0 is off

    c.compress = ConfigDict()
    c.compress.methods = ()  # rows of fastformer.compress.METHODS, in the order in which they are applied
    c.compress.batches = 8  # of training text that gptq, awq, wanda and sparsegpt look at
    c.compress.quantise = ConfigDict()
    c.compress.quantise.format = "int8"  # int8_weights, int4, fp8, float: of matrices that no rule names
    c.compress.quantise.rules = ()  # ("embedding=int8", ".*/mlp/.*=int4"): paths=format; the first counts
    c.compress.quantise.group = 0  # inputs (of a head) that share a scale where inputs stay float; 0: all
    c.compress.quantise.start = 0  # steps in float before the rounding; train.steps is rounding at the end
    c.compress.quantise.rounding = "nearest"  # or gptq, awq: of what is stored in the end
    c.compress.prune = ConfigDict()
    c.compress.prune.sparsity = 0.5  # fraction of the weights of the pruned matrices that end as zeros
    c.compress.prune.pattern = ""  # "2:4" keeps 2 of every 4 inputs of an output, in place of sparsity
    c.compress.prune.scope = "global"  # or matrix: weights compete over all matrices, or within each
    c.compress.prune.matrices = ()  # regexes of paths; () is all but embedding, head, gates and decays
    c.compress.prune.start = 0  # updates before the first zeros
    c.compress.prune.end = 0  # updates when the last come, cubically fewer at a time; 0, a pattern: at start
    c.compress.prune.every = 10  # updates between
    c.compress.prune.score = "magnitude"  # or wanda, sparsegpt: once, at the end of the run
    c.compress.distil = ConfigDict()
    c.compress.distil.teacher = ""  # workdir of a finished run with the same tokeniser
    c.compress.distil.divergence = "forward"  # KL of the next token; or reverse, jensen_shannon
    c.compress.distil.temperature = 1.0  # that logits of both are divided by
    c.compress.distil.weight = 0.5  # of the divergence; the text itself has 1 - weight
    c.compress.distil.hidden = 0.0  # weight of what a learned map of each layer misses of the teacher's
    c.compress.distil.relations = 0.0  # weight of MiniLM's relations among queries, keys and values
    c.compress.distil.relation_heads = 4  # that these are split into, of teacher and student alike
    c.compress.distil.dtype = "float32"  # or bfloat16: of the teacher's matrices and activations
    c.compress.linearise = ConfigDict()
    c.compress.linearise.teacher = ""  # workdir of a finished run of these sizes: the first weights
    c.compress.linearise.transfer = 0  # updates in which what is new learns the teacher's attention, alone
    c.compress.linearise.rank = 8  # of the adapters of q, k, v and output that then learn; 0: all weights do
    c.compress.linearise.alpha = 16.0  # adapters count alpha / rank times
    c.compress.linearise.dtype = "float32"  # or bfloat16: of the teacher's matrices and activations

    c.evaluate = ConfigDict()
    c.evaluate.every = 500  # steps between evaluations on the held-out split; 0 is only at the end
    c.evaluate.rows = 0  # held-out rows in an evaluation during training; 0 is all (the last one takes all)
    c.evaluate.overlap = 0  # tokens of each held-out row that are context only, already scored before
    c.evaluate.batch = 0  # rows at once; 0 is train.batch
    c.evaluate.state_rows = 32  # held-out rows read token by token if generate.state is int8; 0 is all

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints; one more is written at the end
    c.checkpoint.keep = 2  # newest checkpoints kept; the best on the held-out split is kept besides

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl and TensorBoard events
    c.log.trace_from = 10  # the first step that the profiler watches
    c.log.trace_steps = 0  # how many it watches, for TensorBoard and XProf; 0 is none

    c.mesh = ConfigDict()  # devices along each axis; -1 is all that remain
    c.mesh.data = -1  # copies of the model, each on its own rows
    c.mesh.fsdp = 1  # shards of the weights, gathered when used; rows are split over it too
    c.mesh.tensor = 1  # shards of heads, feed-forward neurons and vocabulary
    c.mesh.sequence = 1  # shards of each row in time, for long rows; weights are split over it too

    c.distributed = ConfigDict()  # many processes, one configuration: these alone differ between them
    c.distributed.coordinator = ""  # host:port of process 0; auto asks TPU pods, Slurm, MPI; "" is alone
    c.distributed.processes = 1
    c.distributed.index = 0  # of this process
    c.distributed.restarts = 3  # by a --launcher, without a new checkpoint between, of processes that died
    c.distributed.slurm = ()  # ("nodes=2", "timeout_min=600", "slurm_partition=gpu"): settings of submitit

    c.sharding = ConfigDict()  # which mesh axes each letter of the alphabet is split over
    c.sharding.B = ("data", "fsdp")
    c.sharding.T = ("sequence",)
    c.sharding.S = ("sequence",)
    c.sharding.D = ("fsdp", "sequence")  # of weights; activations have these axes in B and T
    c.sharding.H = ("tensor",)
    c.sharding.G = ("tensor",)
    c.sharding.F = ("tensor",)
    c.sharding.V = ("tensor",)

    c.generate = ConfigDict()
    c.generate.tokens = 128  # at most, after the prompt
    c.generate.temperature = 0.0  # 0 is greedy
    c.generate.top_k = 0  # sample among the k likeliest; 0 is all
    c.generate.top_p = 1.0  # sample among the likeliest that hold this probability
    c.generate.seed = 0  # of sampling
    c.generate.beams = 1  # that go on at once in beam search; 1 is none
    c.generate.length_penalty = 0.6  # of beam search: 0 is none, the larger the longer
    c.generate.state = "float"  # or int8: keys, values and memories as they are kept from token to token
    c.generate.prompt = ""  # continued at the end of training, for result.json and report.md

    c.benchmark = ConfigDict()
    c.benchmark.variants = ()  # rows of the table beside softmax; () is all
    c.benchmark.lengths = (512, 1024, 2048)  # T
    c.benchmark.batch = 1  # B
    c.benchmark.repeats = 5  # timed runs of each, alternating; the median is shown
    return c
