from torch_fixtures import one_thread, own_copies_of_remote_code

__all__ = ["one_thread", "own_copies_of_remote_code"]
