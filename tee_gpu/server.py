"""Start the worker of the split: it holds the Linear and Embedding layers. Settings: README.md beside this file."""

from tsqp.published import server

if __name__ == "__main__":
    server()
