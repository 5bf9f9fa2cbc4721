"""What every layer must agree on: how many expression tokens there are, which token hides a gene, the pseudocount of
effects, and the names of cell states.
"""

N_EXPRESSION_TOKENS = 281
"""0–99 exact, 100–189 in steps of 10, 190–279 in steps of 100, 280 for counts of 10,000 and more (paper, section
2.1).
"""

MASK_TOKEN = 281
"""[MASK]: the count of this gene is not known (hidden in training, not yet drawn in sampling, or never measured)."""

EFFECT_PSEUDOCOUNT = 1e-4
"""ε of effects, differences of log(share of all counts + ε): one count in a cell of 10,000 (docs/log.md: ½ to 2 are
alike).
"""

STATE_FIELD, PROGRAMME_FIELD = STATE_FIELDS = ("lingshu_state", "lingshu_programme")
"""The condition fields that training finds by itself, and their columns in obs: the state of a cell, and how it differs
from the middle of its state.
"""
