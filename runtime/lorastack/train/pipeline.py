"""From a file of prompts to heads: distil, train, measure, write, upload.

Every stage keeps what it makes in the work folder (`train.work`), so the same command goes on where
an earlier one was ended: a finished stage is read, an unfinished one goes on.

Shape suffixes: V vocabulary, H hidden, N tokens to choose from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from lorastack.adapters.store.durable import disk_full_is_exhaustion
from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.startup.device import find_device
from lorastack.startup.model import StartupProgress
from lorastack.train import distill as distilling
from lorastack.train import trainer
from lorastack.train.bundle import lora_files
from lorastack.train.corpus import Corpus
from lorastack.train.distill import DistillOptions, distill
from lorastack.train.evaluate import measure_served
from lorastack.train.folder import json_bytes, stored, write_heads
from lorastack.train.lm_head import served_lm_head
from lorastack.train.local import LocalEngine, Selection, open_engine
from lorastack.train.measure import Summary, measure_heads, summary
from lorastack.train.progress import Progress, silent
from lorastack.train.prompts import PromptFile
from lorastack.train.publish import Publication
from lorastack.train.report import Origin, card, evaluation, plot
from lorastack.train.start import Start, StartOptions, open_start
from lorastack.train.trainer import Trained, TrainOptions, train_heads
from lorastack.train.vocabulary import choose_vocabulary, count_tokens, coverage, output_of
from lorastack.train.work import ADAPTER, CHECKPOINT, CORPUS, HEADS, SERVED, WorkFolder

SERVED_PROMPTS = 16  # held-out ones that the engine answers, one at a time
DRAFT_VOCABULARY = 4096
