//! qcow2 at the built program, judged by `qemu-img`.

use crate::util::{
    content::{MIB, pattern, sparse_image},
    node::Node,
};

#[test]
fn qcow2_exports_are_clean_and_equal_what_the_mount_shows() {
    let node = Node::start();
    sparse_image(&node.scratch("base.raw"), 64 * MIB);
    node.run(&format!("image create base --from {} --wait", node.scratch("base.raw").display()));
    node.run("volume create a --image base");
    node.write("a", 5 * MIB + 512, &pattern(3 * MIB, 7));
    node.run("snapshot create a s");
    node.sh("cat $V/a > then");
    node.write("a", 20 * MIB, &pattern(MIB, 9));
    for (n, flags) in
        ["", "--compress zlib", "--compress zstd", "--cluster-size 4K --compress zstd", "--cluster-size 2M"]
            .iter()
            .enumerate()
    {
        for (from, content) in
            [("volume export a", "$V/a"), ("volume export a@s", "then"), ("image export base", "$I/base")]
        {
            let said = node.run(&format!("{from} out{n}.qcow2 --force --format qcow2 --digest both {flags}"));
            node.sh(&format!(
                "qemu-img check -q out{n}.qcow2; qemu-img compare -q -f raw -F qcow2 {content} out{n}.qcow2"
            ));
            let digests: Vec<&str> = said.lines().collect();
            let sum = |file: &str| node.sh(&format!("sha512sum < {file} | cut -d' ' -f1")).trim().to_owned();
            let expected = [
                format!("file sha512:{}", sum(&format!("out{n}.qcow2"))),
                format!("guest sha512:{}", sum(content)),
            ];
            assert_eq!(digests, expected);
        }
    }
    // What compresses gets smaller, holes take nothing.
    node.sh("[ $(stat -c %s out0.qcow2) -lt $((12 * 1024 * 1024)) ]");
    for (words, code, part) in [
        ("volume export a x --compress zstd", 1, "raw"),
        ("volume export a x --format qcow2 --cluster-size 100", 1, "power of two"),
        ("volume export a - --format qcow2", 2, "stdout"),
        ("volume export a - --digest file", 2, "--digest"),
        ("volume export a out0.qcow2 --format qcow2", 4, "exists"),
    ] {
        let said = node.refused(words, code);
        assert!(said.contains(part), "{words}: {said}");
    }
    assert!(!node.scratch("x").exists());
}
