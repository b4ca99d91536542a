from .errors import InputError as InputError
from .models.config import ModelConfig as ModelConfig
from .models.load import load_model as load_model
from .models.model import Model as Model
from .models.model import for_decoding as for_decoding
from .models.save import save_model as save_model
from .search import Guide as Guide
from .search import SearchConfig as SearchConfig
from .text.tokenizer import load_tokenizer as load_tokenizer

__version__: str
