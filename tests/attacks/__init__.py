"""Files as an attacker would write them: a module for each kind of file, each with tables of attacks and their outcome.

`attack.py` says what must hold of all of them. What is only damaged, or does not fit, is in tests/test_bad_inputs.py.
"""
