"""Chat models that answer requests, behind an OpenAI-compatible server or in a local folder.

endpoints.py      which model, where, with which settings      client.py       requests: concurrency, retries, budget
openai_client.py  a server, through the ``openai`` package     request_log.py  requests and replies in sqlite3
local_model.py    a run's or a model's folder                  jobs.py         configuration and folder of a job
cost.py           upper bounds and progress
"""
