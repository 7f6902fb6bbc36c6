"""python -m vlattn_lab.winoground DIRECTORY --model FOLDER."""

from vlattn_lab.winoground.run import main

if __name__ == "__main__":
    main()
