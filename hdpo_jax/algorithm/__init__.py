"""The paper: advantages of two channels, their loss, and one step of learning as one program."""
