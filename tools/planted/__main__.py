from tools.planted.table import main

if __name__ == "__main__":
    main()
