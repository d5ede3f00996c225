def markdown(*a): return ""
def plot(*a): pass
