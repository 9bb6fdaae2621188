"""Two processes compute what one does: losses, gradients, scores, files. One that ends ends the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_cases
