from ptx.planted.table import main

main()
