class Collected: pass
def collect(): pass
def load(): pass
