"""Export: a twin in the forms that other programs load. One file for each format is in `formats/`.

`export_twin` (in `run.py`) writes one of them. What the front of a server reads of an export is in `served.py`.
"""
