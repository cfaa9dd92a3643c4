"""Wrong uses of every command: one short line with the value, the bound and the remedy, and the documented status.

And a property: whatever is given to any option of any command, it is accepted or refused in one line.
"""

import contextlib
import io
import json
import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report_runs import make_run
from resist import cli
from resist.cli import main
from resist.cli.options import options_of
from resist.runs import atomic

# What no message may show: the insides of Python.
INSIDES = re.compile(
    r"<class |<function |PosixPath|dict_keys|tensor\(|\bNone\b|NoneType|object at 0x|Traceback|internal er"
)

# The arguments of a command, and a part of the message.
TRAIN = """
--seed 12345678901234567890123 | --seed 12345678901234567890123 is too large; give at most 9223372036854775807
--seed -99999999999999999999 | is too small; give at least -9223372036854775807
--seed 1.5 | --seed '1.5' is not a whole number
--seed "" | --seed needs a value
--seed 0x10 | '0x10' is not a whole number
--epochs 1e30 | --epochs 1e30 is too large; give at most 1000000
--epochs nan | --epochs nan is not a finite number
--epochs inf | --epochs inf is not a finite number
--epochs -inf | --epochs -inf is not a finite number
--epochs 1e400 | --epochs 1e400 is not a finite number
--epochs -0.0 | --epochs -0.0 must be above 0
--epochs 0 | --epochs 0 must be above 0
--epochs 0x10 | --epochs '0x10' is not a number
--epochs 1,5 | --epochs '1,5' is not a number
--epochs "" | --epochs needs a value
--workers 100000 | --workers 100000 is too large; give at most 4096
--workers 0 | --workers 0; must be at least 1
--workers -1 | --workers -1; must be at least 1
--workers 1.0 | '1.0' is not a whole number
--workers 1e2 | '1e2' is not a whole number
--workers four | 'four' is not a whole number
--workers | --workers needs a value
--elastic 4 | --elastic 4 is not LEAST:MOST, as in 2:8; give the fewest and the most processes
--elastic two:eight | --elastic two:eight is not LEAST:MOST, as in 2:8
--elastic -1:4 | --elastic -1:4 is not LEAST:MOST, as in 2:8
--elastic 0:4 | --elastic 0:4: the fewest processes must be 1 or more
--elastic 4:2 | --elastic 4:2: the fewest processes must be 1 or more, and the most not fewer
--elastic 2:4097 | and the most not fewer, up to 4096; give them as in 2:8
--elastic 2:3 --workers 4 | --workers 4 is outside of --elastic 2:3
--elastic 2:4 --processes 2 | --processes 2 cannot be given with --elastic
--elastic 2:4 --strategy ddp | --strategy ddp joins the workers in every step and cannot go on with others
--elastic 2:4 --fragments auto | --fragments auto is chosen from the times of earlier rounds
--elastic 2:4 --capacities auto | --capacities auto is chosen from the times of earlier rounds
--processes 0 | --processes 0 is too small; give at least 1
--processes 100000 --workers 4000 | --processes 100000 exceeds --workers 4000; give at most one process per worker
--processes 4000 --workers 4000 --min-depth 0 | --processes 4000 is too large for
--batch-size 0 | --batch-size 0 is too small; give at least 1
--batch-size -5 | --batch-size -5 is too small; give at least 1
--batch-size 99999999999 | --batch-size 99999999999 is too large; give at most 1000000000
--batch-size 1e5 | '1e5' is not a whole number
--grad-accum-steps 0 | --grad-accum-steps 0 is too small; give at least 1
--grad-accum-steps 3 | --batch-size 128 is not a multiple of --grad-accum-steps 3; change one of the two
--lr -1 | --lr -1 is too small; give at least 0
--lr -1e-3 | --lr -1e-3 is too small; give at least 0
--lr nan | --lr nan is not a finite number
--lr 1e21 | --lr 1e21 is too large
--lr 0.1 0.2 | not understood: 0.2
--lr | --lr needs a value
--weight-decay -5e-4 | --weight-decay -5e-4 is too small; give at least 0
--weight-decay nan | --weight-decay nan is not a finite number
--model-ema-decay 1.0 | --model-ema-decay 1.0 is not between 0 and 1; give for example 0.999
--model-ema-decay -0.5 | --model-ema-decay -0.5 is not between 0 and 1
--timeout-s 0 | --timeout-s 0 must be above 0
--timeout-s -1 | --timeout-s -1 must be above 0
--timeout-s 1e12 | --timeout-s 1e12 is too large; give at most 100000000
--num-evals 0 | --num-evals 0 is too small; give at least 1
--num-evals 10000000 | --num-evals 10000000 is too large; give at most 1000000
--checkpoint-rounds 0 | --checkpoint-rounds 0 is too small; give at least 1
--restarts -1 | --restarts -1 is too small; give at least 0
--restarts 1000000000 | --restarts 1000000000 is too large; give at most 1000
--local-steps 0 | --local-steps 0; must be at least 1
--local-steps 99999999999 | --local-steps 99999999999 is too large; give at most 1000000000
--min-depth -1 | --min-depth -1 is negative; give 0 or more
--min-depth 30 | --min-depth 30 exceeds the 8 blocks of chain layer3:1-8; lower it or add chains
--capacities 0 0 0 0 | capacity 0 of worker 0 is less than 1
--capacities 1 2 | --capacities 1 2 has 2 values for --workers 4; give one for each worker
--capacities 1 1 1 1 | hold 4 of the 8 blocks of chain layer3:1-8; raise them
--capacities a | --capacities 'a' is not whole numbers
--warmup-rounds -1 | --warmup-rounds -1 is too small; give at least 0
--lr-warmup-steps -1 | --lr-warmup-steps -1 is too small; give at least 0
--data-workers -1 --data folder | --data-workers -1 is too small; give at least 0
--data-workers 2 | --data-workers has no effect with --data digits, only with folder
--image-size 31 --data folder | --image-size 31 is too small; give at least 32
--image-size 100000 --data folder | --image-size 100000 is too large; give at most 8192
--image-size 64 | --image-size has no effect with --data digits
--skip-bad-files | --skip-bad-files has no effect with --data digits
--until rounds=0 | --until 'rounds=0' is not rounds=N, seconds=N, gb=N or accuracy=N with N above 0
--until rounds=nan | --until 'rounds=nan' is not rounds=N
--until foo | --until 'foo' is not rounds=N
--until accuracy=95 | an accuracy is at most 1; give 0.95 for 95 %
--until rounds=1 rounds=2 | --until 'rounds=2' is the second limit of rounds; give one
--until "" | --until needs a value
--strategy foo | --strategy 'foo' is not one of resist, local_sgd, diloco, ddp
--strategy ddp --min-depth 3 | --min-depth has no effect with --strategy ddp; remove it
--strategy ddp --replicate | --replicate has no effect with --strategy ddp; remove it
--strategy local_sgd --capacities 1 2 3 4 | --capacities has no effect with --strategy local_sgd; remove it
--min-depth 2 --capacities 4 4 4 4 | --min-depth 2 has no effect with --capacities
--device gpu | --device 'gpu' is not one of auto, cpu, cuda
--device cuda:0 | --device 'cuda:0' is not one of auto, cpu, cuda
--precision fp16 | --precision 'fp16' is not one of fp32, bf16
--log tensorbord | --log 'tensorbord' is not one of tensorboard, wandb
--optimizer foo | --optimizer foo is no class of torch.optim; give one of
--optimizer sdg | --optimizer sdg is no class of torch.optim; did you mean sgd, or timm:NAME for one of timm
--lr-schedule linear | --lr-schedule 'linear' is not one of step, cosine, constant
--batchnorm none | --batchnorm 'none' is not one of recalibrate, average, batch
--on-nonfinite ignore | --on-nonfinite 'ignore' is not one of stop, drop
--model foo | --model foo is not known; choose one of
--model nope:foo | 'nope' is not one of torchvision, timm, transformers
--model "" | --model needs a value
--model-args width=0 | --model-args width=0; must be 1 to 10000
--model-args width=abc | 'abc' is not a whole number
--model-args width=1000000 | --model-args width=1000000; must be 1 to 10000
--model-args depths=1,1 | --model-args depths=1,1; give four numbers of blocks
--model-args depths=1,1,100000000,1 | give four numbers of blocks, each 1 to 10000
--model-args foo=1 | 'foo' is not an argument of preact_small; allowed are depths, width, final_norm, zero_init
--model-args width=4 width=5 | 'width' is given twice
--model-args final_norm=maybe | 'maybe' is not true or false
--model-args zero_init=true --init-from timm:x.pth | --model-args zero_init has no effect with --init-from
--chain foo | chain 'foo': 'foo' has no run of residual blocks; found: layer3:1-8
--chain layer3:5-2 | does not have the form NAME:FIRST-LAST, as in layer3:1-22
--chain layer3:1-1000000000000 | its blocks are not interchangeable, or do not exist; found
--chain layer3 layer3 | overlap; name each block once
--data foo | --data foo is not known; choose one of digits, cifar10
--data folder --data-dir nowhere | nowhere/train: No such file or directory; --data-dir has to contain
--out HERE | exists already and is never overwritten; give another directory, or remove it
--out /proc/x | --out /proc/x cannot be made
--out /dev/null | exists already and is never overwritten
--out /dev/null/x | --out /dev/null/x cannot be made
--out "" | --out needs a value
--out LONG | cannot be made: File name too long; give another directory
--resume nowhere | nowhere is not a run directory: config.json: No such file or directory
--resume /etc/passwd | /etc/passwd is not a run directory: config.json: Not a directory
--resume RUN --batch-size 3 | --batch-size cannot change in a resumed run; remove it
--resume RUN --seed 7 | --seed cannot change in a resumed run; remove it
--resume "" | --resume needs a value
--config nowhere | nowhere: No such file or directory; give a JSON file like the config.json of a run
--config /dev/null | /dev/null: Not a file; give a JSON file
--config /dev/full | /dev/full: Not a file; give a JSON file
--config /tmp | /tmp: Is a directory; give a JSON file
--config PIPE | Nothing came from this pipe for 0 s
--config BIG | Larger than 16 MiB
--config BINARY | is not a configuration
--config "" | --config needs a value
--foo | --foo is not an option of resist train; see resist train --help
--worker 4 | --worker is not an option of resist train; did you mean --workers?
--learning_rate 4 | --learning-rate is not an option of resist train; see
--momentum 0.9 | --momentum is not an option but a key of the file for --config: {"optimization": {"momentum": ...}}
--loaders 4 | --loaders is now --data-workers
--compile --no-compile | --compile and --no-compile contradict each other; give one
--data voc2007 --compile | --compile does not support detection
foo | not understood: foo
"""
OTHERS = """
 | no command given; choose one of train, plan, cost, probe
foo | 'foo' is not a command; choose one of train, plan, cost, probe, compare, evaluate, export, watch, report
trian | 'trian' is not a command; did you mean train?
--versio | '--versio' is not a command; did you mean --version?
plan --rounds 0 | --rounds 0 is too small; give at least 1
plan --rounds -1 | --rounds -1 is too small; give at least 1
plan --rounds 100000 | --rounds 100000 is too large; give at most 10000
plan --rounds 10000 | --rounds 10000 of --workers 4 are more than 20,000 lines; give at most 5000
plan --workers 4096 --rounds 5 | --rounds 5 of --workers 4096 are more than 20,000 lines; give at most 4
plan --rounds 1.5 | '1.5' is not a whole number
plan --num-classes 0 | --num-classes 0; must be at least 1
plan --num-classes 100000000 | --num-classes 100000000 is too large; give at most 1000000
plan --seed 99999999999999999999 | --seed 99999999999999999999 is too large
plan --epochs 3 | --epochs is not an option of resist plan
plan --svg /proc/x | --svg /proc/x cannot be written: No such file or directory; give another file
plan --svg HERE | cannot be written: File exists; give another file
plan --json --svg | --svg needs a value
cost --workers 100000 | --workers 100000 is too large; give at most 4096
cost --workers 2 100000 | --workers 100000 is too large; give at most 4096
cost --workers 0 | --workers 0; must be at least 1
cost --workers 4 4 | strategy resist with 4 workers is given 2 times; give it once
cost --workers | --workers needs a value
cost --strategies foo | strategy 'foo' is not one of resist, local_sgd, diloco, ddp
cost --strategies | --strategies needs a value
cost --strategies ddp --wire int4 | --wire has no effect with --strategies ddp; remove it, or add a strategy
cost --strategies ddp --fragments 2 | --fragments has no effect with --strategies ddp
cost --strategies ddp --replicate | --replicate has no effect with --strategies ddp
cost --strategies ddp --optimizer-state reset | --optimizer-state has no effect with --strategies ddp
cost --link-gbit-s nan --images-s 5 | --link-gbit-s nan is not a finite number
cost --link-gbit-s 0 --images-s 5 | --link-gbit-s 0; must be at least 1e-09 Gbit/s and finite
cost --link-gbit-s -1 --images-s 5 | --link-gbit-s -1; must be at least 1e-09 Gbit/s and finite
cost --link-gbit-s 1e-320 --images-s 5 | --link-gbit-s 1e-320; must be at least 1e-09 Gbit/s
cost --link-gbit-s 1e300 --images-s 5 | --link-gbit-s 1e300 is too large; give at most 1000000000
cost --link-gbit-s 1 --images-s 0 | --images-s 0; must be at least 1e-09 images per second and finite
cost --link-gbit-s 1 --images-s 1e-320 | --images-s 1e-320; must be at least 1e-09 images per second
cost --link-gbit-s 1 --images-s 1e300 | --images-s 1e300 is too large
cost --link-gbit-s 1 --images-s 1 2 3 --workers 2 | 3 speeds for 2 workers; give one for each worker
cost --latency-ms -1 --link-gbit-s 1 --images-s 5 | --latency-ms -1; must be at least 0 ms and finite
cost --latency-ms 5 | has no effect without --link-gbit-s; give both
cost --images-s 5 | seconds need both a link (--link-gbit-s or --link-file) and a speed (--images-s
cost --calibrate --images-s 5 --link-gbit-s 1 | --calibrate measures --images-s; give one of the two
cost --link-file none --images-s 5 | --link-file none: No such file or directory; give a file that resist probe has
cost --link-file none --link-gbit-s 1 | --link-file has what --link-gbit-s says; give one of the two
cost --link-file none --latency-ms 1 | --link-file has what --latency-ms says; give one of the two
probe | give --processes 2 for the loopback interface
probe --processes 1 | links are between processes, and there is 1; start at least 2
probe --processes 17 | --processes 17 is too large for one machine; give at most 16
probe --processes 2 --timeout-s 0 | --timeout-s 0 must be above 0
probe --processes 2 --device gpu | --device 'gpu' is not one of auto, cpu, cuda
probe --processes 2 --backend mpi | --backend 'mpi' is not one of auto, gloo, nccl
probe --processes 2 --out . | --out . exists already; give another file, or remove it
probe --processes 2 --out none/links.json | there is no folder
rendezvous | --bind is missing: STR Name or address of this machine
rendezvous --bind 127.0.0.1 | no secret: set RESIST_SECRET in the environment, or give --secret-file; python -c
rendezvous --bind 127.0.0.1 --secret-file nowhere | the secret cannot be read from the file nowhere: No such file
rendezvous --bind 127.0.0.1 --secret-file THERE | has 0 bytes; it must have 16 to 4096
rendezvous --bind 127.0.0.1 --port 70000 | --port 70000 must be 0 to 65535
rendezvous --bind 203.0.113.7 --secret-file HERE | cannot listen at 203.0.113.7, port 29400: Cannot assign requested
cost --model-ema-decay nan | --model-ema-decay nan is not a finite number
cost --batch-size 0 | --batch-size 0
cost --local-steps 0 | --local-steps 0; must be at least 1
cost --capacities 4 4 --workers 2 3 | --capacities 4 4 has 2 values for --workers 3; give one for each worker
cost --device foo | --device 'foo' is not one of auto, cpu, cuda
compare --strategies foo | 'foo' is not one of resist, local_sgd, diloco, ddp
compare --strategy resist | --strategy is for one run; compare takes --strategies
compare --lr -2 | --lr -2 is too small; give at least 0
compare --workers 99999 | --workers 99999 is too large; give at most 4096
watch nowhere | nowhere is not a run directory: config.json: No such file or directory
watch RUN --patience-s nan | --patience-s nan must be more than 0
watch RUN --patience-s -1 | must be more than 0
watch | PATH is missing: Run directory
report | no run directory is given; name at least one, as in resist report runs/a
report nowhere | nowhere is not a run directory
report RUN RUN | a run directory is given twice; name each once
report RUN -o x.pdf | --out x.pdf does not end in .html, .md or .png; give --format
report RUN --format pdf | --format 'pdf' is not one of html, md, png
report RUN -o THERE | exists already; give --force to replace it, or another --out
report RUN -o /proc/x.html | --out /proc/x.html cannot be written: No such file or directory; give another file
report RUN -o /dev/null/x.html | cannot be written: Not a directory; give another file
report NOT_JSON | config.json is damaged
report NO_ROUND | holds no complete round; the run ended before its first one did
report BAD_LINE | line 2 of
report BAD_WORKERS | method.workers is not a number from 1 to 4096; restore it
evaluate nowhere | nowhere is not a run directory
evaluate RUN --device foo | --device 'foo' is not one of auto, cpu, cuda
evaluate BAD_MODEL | BAD_MODEL/model.safetensors is damaged
evaluate NOT_JSON | config.json is damaged
export nowhere --to onnx | nowhere is not a run directory
export RUN | --to is missing; give one of program, onnx, safetensors, torch, torchvision, timm
export RUN --to foo | --to 'foo' is not one of program, onnx, safetensors, torch, torchvision, timm
export BAD_MODEL --to torch | model.safetensors
train --resume NOT_JSON | config.json is damaged
train --resume BAD_WORKERS | --workers 0; must be at least 1
train --resume OTHER | was written by another version of resist (its config.json has the entry 'color')
"""
# The content of a file for `train --config`, and a part of the message.
FILES: list[tuple[object, str]] = [
    ("", "is not a configuration"),
    ("{", "is not a configuration"),
    ("[" * 100_000, "is not a configuration"),
    ("nul", "is not a configuration"),
    ('{"method": {}, "method": {}}', "it has the entry 'method' twice"),
    ('{"method": {"workers": 2, "workers": 3}}', "it has the entry 'workers' twice"),
    ('{"optimization": {"epochs": 1e400}}', "--epochs inf is not a finite number"),
    ('{"optimization": {"lr": NaN}}', "--lr nan is not a finite number"),
    ('{"run": {"seed": 123456789012345678901234567890}}', "--seed about 1e29 is too large"),
    ([], "it is not a table of names and values"),
    ({"methods": {}}, "unknown entry 'methods'; did you mean method?"),
    ({"method": {"samplin": "all"}}, "unknown entry 'samplin'; did you mean sampling?"),
    ({"method": {"zzz": 1}}, "unknown entry 'zzz'; the config.json of a run has all entries"),
    ({"optimization": {"workers": 1}}, "unknown entry 'optimization.workers'; it belongs to 'method'"),
    ({"network": {"width": 64}}, "an entry of an earlier version of resist, is now model_args"),
    ({"method": 3}, "method is not a table of names and values"),
    ({"method": {"workers": "two"}}, 'method.workers has the value "two", which is not a whole number'),
    ({"method": {"workers": True}}, "method.workers has the value true, which is not a whole number"),
    ({"method": {"workers": 2.0}}, "method.workers has the value 2.0, which is not a whole number"),
    ({"method": {"workers": None}}, "method.workers has the value null, which is not a whole number"),
    ({"method": {"capacities": 4}}, "method.capacities has the value 4, which is not a list"),
    ({"method": {"outer": [0.7]}}, "which is not a list of 2 numbers"),
    ({"method": {"outer": [0, 0.9]}}, "learning rate 0.0; must be more than 0 and finite"),
    ({"method": {"outer": [1, 1]}}, "momentum 1.0; must be at least 0 and less than 1"),
    ({"method": {"sampling": "some"}}, 'method.sampling has the value "some", which is not one of all, shard'),
    ({"method": {"scale": "-1"}}, "method.scale='-1' is not inclusion, 1/S, or a number above 0"),
    ({"method": {"capacities_by_round": ["-1=6"]}}, "is not ROUNDS=BLOCKS"),
    ({"method": {"wire_parts": ["state=int4", "state=int8"]}}, "state=int8 is the second format of state; give one"),
    ({"method": {"redraw_every": 0}}, "method.redraw_every=0 is too small; give at least 1"),
    ({"method": {"redraw_every": 1.5}}, "method.redraw_every has the value 1.5, which is not a whole number"),
    ({"optimization": {"epochs": "3"}}, 'optimization.epochs has the value "3", which is not a number'),
    ({"optimization": {"momentum": 1.5}}, "optimization.momentum=1.5; must be less than 1; 0.9 is usual"),
    ({"optimization": {"momentum": -0.1}}, "optimization.momentum=-0.1 is too small; give at least 0"),
    ({"optimization": {"label_smoothing": 1}}, "optimization.label_smoothing=1; must be less than 1"),
    ({"optimization": {"clip_grad_norm": 0}}, "optimization.clip_grad_norm=0 must be above 0"),
    ({"optimization": {"mixup": -1}}, "optimization.mixup=-1 is too small; give at least 0"),
    ({"optimization": {"rand_augment": [2, 31]}}, "a magnitude from 0 to 30"),
    ({"optimization": {"optimizer_args": {"eps": {}}}}, "eps is not a finite number, true, false, a string"),
    ({"optimization": {"optimizer_args": {"epss": 1}}}, "epss"),
    ({"network": {"data_dir": ""}}, 'network.data_dir has the value "", which is not the name of a file or folder'),
    ({"network": {"data_dir": "a\0b"}}, "which is not the name of a file or folder"),
    ({"network": {"splits": "all"}}, 'network.splits has the value "all", which is not a list'),
    ({"machine": {"log": ["tensorbord"]}}, 'machine.log has the value "tensorbord", which is not one of'),
    ({"machine": {"compile": 1}}, "machine.compile has the value 1, which is not true or false"),
    ({"run": {"until": ["hours=1"]}}, "--until 'hours=1' is not rounds=N"),
]  # fmt: skip
ENVIRONMENTS: list[tuple[dict[str, str], str]] = [
    ({"RANK": ""}, "RANK is in the environment and WORLD_SIZE is not; set both, as torchrun does, or unset it"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is in the environment and RANK is not"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' cannot be used; give 1 to 4096"),
    ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a' cannot be used; give 0 to 4095"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 exceeds the last process of WORLD_SIZE=2; give 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "99999"}, "WORLD_SIZE='99999' cannot be used; give 1 to 4096"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": ""}, "MASTER_PORT='' cannot be used"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "give 1 to 65535"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK='x' cannot be used"),
    ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS='abc' cannot be used; give the threads of a process, as in 1"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0' cannot be used"),
    ({"RESIST_FORK": "yes"}, "RESIST_FORK='yes' cannot be used; give 0 or 1, or unset it"),
    ({"RESIST_COMMAND": "{"}, "RESIST_COMMAND='{' cannot be used; resist sets it for the processes that it starts"),
    ({"RESIST_LIFELINE": ""}, "RESIST_LIFELINE='' cannot be used"),
    ({"TORCHELASTIC_RESTART_COUNT": ""}, "TORCHELASTIC_RESTART_COUNT='' cannot be used"),
]


@dataclass
class Case:
    arguments: list[str]
    text: str
    environment: dict[str, str]


def cases() -> list[Case]:
    lines = [f"train {line}" for line in TRAIN.strip("\n").splitlines()] + OTHERS.strip("\n").splitlines()
    split = [line.rpartition(" | ") if " | " in line else ("", "", line.partition("| ")[2]) for line in lines]
    found = [Case(shlex.split(arguments), text, {}) for arguments, _, text in split]
    found += [Case(["train", "--config", f"FILE{number}"], text, {}) for number, (_, text) in enumerate(FILES)]
    return found + [Case(["train"], text, environment) for environment, text in ENVIRONMENTS]


CASES = cases()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files and folders that the wrong uses name."""
    folder = tmp_path_factory.mktemp("wrong uses")
    names = ["RUN", "NOT_JSON", "NO_ROUND", "BAD_LINE", "BAD_WORKERS", "BAD_MODEL", "OTHER"]
    runs = {name: make_run(folder / name, rounds=3) for name in names}
    (runs["NOT_JSON"] / "config.json").write_bytes(b"\xff{")
    (runs["NO_ROUND"] / "metrics.jsonl").write_text("")
    lines = (runs["BAD_LINE"] / "metrics.jsonl").read_text().splitlines()
    (runs["BAD_LINE"] / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))
    (runs["BAD_MODEL"] / "model.safetensors").write_bytes(b"\0" * 100)
    for name, part, entry, value in (("BAD_WORKERS", "method", "workers", 0), ("OTHER", "network", "color", 1)):
        file = runs[name] / "config.json"
        content = json.loads(file.read_text())
        content[part][entry] = value
        file.write_text(json.dumps(content))
    for run in runs.values():
        file = run / "config.json"
        file.write_bytes(file.read_bytes().replace(b"cifar10", b"digits"))
        (run / "state.json").write_text(json.dumps({"state": "finished", "rounds": 3, "error": ""}))
    (folder / "there.html").touch()
    os.mkfifo(folder / "PIPE")
    (folder / "BINARY").write_bytes(bytes(range(256)))
    with (folder / "BIG").open("wb") as file:
        file.truncate(2**30)
    for number, (content, _) in enumerate(FILES):
        (folder / f"FILE{number}").write_text(content if isinstance(content, str) else json.dumps(content))
    found = {path.name: str(path) for path in folder.iterdir()}
    return found | {
        "HERE": str(folder / "BINARY"),
        "THERE": str(folder / "there.html"),
        "LONG": str(folder / ("x" * 300)),
    }


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that begins to train, although it should be refused, fails at once."""

    def work(*_: object, **__: object) -> int:
        raise AssertionError("training began")

    monkeypatch.setattr("resist.training.train.train", work)
    monkeypatch.setattr("resist.training.train.open_data", work)
    monkeypatch.setattr("resist.cli.probe.launch", work)
    monkeypatch.setattr(atomic, "PIPE_S", 0.01)


def ended(arguments: list[str], capsys: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_there_are_200_wrong_uses() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(
    "case",
    [  # every third is one of the fast tests
        pytest.param(
            case,
            id=" ".join([*case.environment, *case.arguments])[:60],
            marks=pytest.mark.slow if number % 3 else (),
        )
        for number, case in enumerate(CASES)
    ],
)
def test_a_wrong_use_is_refused_in_one_short_line(case: Case, places, no_work, capsys, monkeypatch) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    status, out, err = ended([places.get(argument, argument) for argument in case.arguments], capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    shortened = err
    for name, place in sorted(places.items(), key=lambda item: -len(item[1])):
        shortened = shortened.replace(place, name)
    assert err.startswith("resist: ")
    assert len(shortened) <= 300
    assert case.text in shortened
    assert not INSIDES.search(err)


ODD = st.one_of(
    st.sampled_from([
        "", "-1", "0", "nan", "-inf", "1e400", "-0.0", "0x10", "1_000", "\u0664", " 3", "--", "-", "=", "a=b", "None",
        "[]", "os.devnull", "/dev/full", "9" * 5000, os.fsdecode(b"caf\xe9"), "a\nb", "\x1b[31m", "x" * 300, "1 2",
        "%s", "{}",
    ]),
    st.integers().map(str), st.floats().map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip
COMMANDS = {
    name: (["RUN"] if name in ("watch", "report") else ["nowhere"] if name in ("evaluate", "export") else [],
           [flag for option in options_of(record).values() for flag in option.flags])
    for name, (record, _) in cli.COMMANDS.items()
}  # fmt: skip


@st.composite
def lines(draw: st.DrawFn, name: str) -> list[str]:
    """Arguments of a command: one or two of its options, each with values of any kind."""
    positional, flags = COMMANDS[name]
    words = [name, *positional]
    for flag in draw(st.lists(st.sampled_from(flags), min_size=1, max_size=2)):
        values = draw(st.lists(ODD, max_size=2))
        words += [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_given_to_an_option_is_accepted_or_refused_in_one_line(name, places, monkeypatch, tmp_path) -> None:
    """Up to the point where work begins: a command that would build a network ends there with status 0."""

    def work(*_: object, **__: object) -> None:
        raise SystemExit(0)

    def start(*_: object) -> None:
        raise BaseException("training began")

    for place in ("resist.tasks.network_builder", "resist.training.preflight.network_builder"):
        monkeypatch.setattr(place, work)
    monkeypatch.setattr("resist.cli.train._start_processes", start)
    monkeypatch.setattr("resist.cli.probe.launch", work)
    monkeypatch.setattr("resist.cli.report.write", lambda *_: [])
    monkeypatch.setattr("resist.members.store_server.StoreServer", work)
    monkeypatch.setattr(atomic, "PIPE_S", 0.01)
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=40)
    @given(lines(name))
    def check(arguments: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main([places.get(argument, argument) for argument in arguments])
        text = err.getvalue()
        assert (end.value.code or 0, text.count("\n")) in ((0, 0), (2, 1)), text
        assert len(text) < 700  # a path may be long
        assert not INSIDES.search(text.replace("'None'", "").replace(" None", ""))

    check()
