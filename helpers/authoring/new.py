class NameTaken(Exception): pass
