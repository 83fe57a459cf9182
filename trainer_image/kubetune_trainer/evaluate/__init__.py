"""Evaluate a model with lm_eval's tasks and metrics on our own decoder.

`trees` and `score` compute likelihoods, `work` spreads requests over ranks and keeps what is answered, `model` is what
lm_eval sees, `tasks` finds tasks and their data, `results` and `gates` turn answers into numbers and verdicts.
"""

import logging

# lm_eval warns of every default that a task relies on.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
