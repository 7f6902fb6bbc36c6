from vlattn_lab.train.run import main

main()
