"""The front of a server that has a twin's adapters: it routes each request, and forwards it under an adapter's name.

`routing.py` chooses the adapter, `app.py` is the web application, and `twin-bench serve` runs it.
"""
