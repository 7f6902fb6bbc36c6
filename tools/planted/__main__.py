from tools.planted.table import main

main()
