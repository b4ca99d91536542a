from .config import DPOConfig as DPOConfig
from .config import SFTConfig as SFTConfig
from .fine_tuning import Trained as Trained
from .fine_tuning import dpo as dpo
from .fine_tuning import estimate_memory as estimate_memory
from .fine_tuning import sft as sft
