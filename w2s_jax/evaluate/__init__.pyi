from .harness import lm_eval as lm_eval
from .judging import judge as judge
from .quantisation import report_quantisation as report_quantisation
