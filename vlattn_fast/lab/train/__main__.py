from vlattn_fast.lab.train.run import main

main()
