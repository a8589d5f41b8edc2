"""What runs inside the sandbox: standard library, NumPy, PIL, matplotlib and IPython only.

The host never imports the shell; it shares `frames` and a few numbers, and treats what comes out of a session as
untrusted bytes.
"""
