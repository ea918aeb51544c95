# One line for everything in the directory $1, so that two trees can be compared wherever they are mounted. Run by
# busybox on both sides. Sizes and link counts of directories are left out: they are a file system's own affair. So is
# the time of the root: images of directories carry none, to be repeatable.
cd "$1" || exit
stat -c 'directory %n %f %u:%g' .
find . -mindepth 1 -type d -exec stat -c 'directory %n %f %u:%g %Y' {} +
find . -type l -exec stat -c 'link %N %u:%g %Y' {} +
find . -type f -exec stat -c 'file %n %f %u:%g %Y %s bytes %h links' {} +
find . ! -type d ! -type l ! -type f -exec stat -c 'special %n %f %u:%g %Y %t:%T' {} +
find . -type f -exec sha256sum {} +
