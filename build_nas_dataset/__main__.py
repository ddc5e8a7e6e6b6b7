from build_nas_dataset.build_nas_dataset import main, parse_args

main(parse_args())
