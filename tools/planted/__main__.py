import sys

if "--core" in sys.argv:
    from tools.planted.core import main
else:
    from tools.planted.table import main

if __name__ == "__main__":
    main()
