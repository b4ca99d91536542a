from .config import ReasonConfig as ReasonConfig
from .config import StagesConfig as StagesConfig
from .runner import plan as plan
from .runner import run as run
