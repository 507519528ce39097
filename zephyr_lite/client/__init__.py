"""Chat models that answer requests: servers that speak the OpenAI chat API, or a local folder; journal and budget.

types.py    what is asked, what comes back, what goes wrong      desk.py     where requests are handed in
client.py   one try over HTTP                                    line.py     an endpoint, and what a failure means
local.py    a local folder, in batches                           weights.py  its models, from one loaded base
keys.py     keys, which appear nowhere                           pace.py     how fast it is asked
journal.py  what was sent and what came back                     budget.py   what is spent, and what may be
"""
