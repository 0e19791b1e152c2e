//! qcow2 at the built program, judged by `qemu-img`.

use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

use serde_json::Value;

use crate::util::{
    content::{MIB, pattern, sparse_image},
    node::Node,
    origin::Origin,
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

#[test]
fn qcow2_images_come_in_and_serve_volumes_like_raw_ones() {
    let node = Node::start();
    sparse_image(&node.scratch("base.raw"), 48 * MIB + 512);
    node.sh("qemu-img convert -f raw -O qcow2 base.raw plain.qcow2
         qemu-img convert -f raw -O qcow2 -c base.raw zlib.qcow2
         qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd base.raw zstd.qcow2
         qemu-img convert -f raw -O qcow2 -o extended_l2=on,cluster_size=128k base.raw subclusters.qcow2");
    for name in ["plain", "zlib", "zstd", "subclusters"] {
        let file = node.scratch(&format!("{name}.qcow2"));
        let origin = Origin::start(fs::read(&file).unwrap());
        let sum = node.sha512(&file);
        node.run(&format!("image create {name} --from {} --checksum {sum} --wait", origin.url()));
        let image = node.json(&format!("image get {name}"));
        assert_eq!((&image["format"], &image["sha512"]), (&"qcow2".into(), &sum.as_str().into()));
        assert_eq!(image["size_bytes"], fs::metadata(&file).unwrap().len());
        assert_eq!(image["virtual_size_bytes"], 48 * MIB + 512);
        node.sh(&format!("cmp base.raw $I/{name}"));
        node.run(&format!("image verify {name}"));

        node.run(&format!("volume create {name} --image {name}"));
        node.sh(&format!("cmp base.raw $V/{name}; cp base.raw model"));
        let model = node.scratch("model");
        for (at, len, seed) in [(5 * MIB + 512, 3 * MIB, 7), (512, 100, 8), (40 * MIB + 4000, 70_000, 9)] {
            let bytes = pattern(len, seed);
            node.write(name, at, &bytes);
            fs::OpenOptions::new().write(true).open(&model).unwrap().write_all_at(&bytes, at).unwrap();
        }
        node.sh(&format!("cmp model $V/{name}"));
        // Exports, clones and flattening read the base, too.
        node.run(&format!("volume export {name} out.raw --force"));
        node.run(&format!("image export {name} image.qcow2 --format qcow2 --force"));
        node.sh("cmp model out.raw; qemu-img compare -q -f raw -F qcow2 base.raw image.qcow2");
        node.run(&format!("image create copy-{name} --from image:{name} --wait"));
        node.sh(&format!("cmp base.raw $I/copy-{name}"));
        node.run(&format!("volume flatten {name}"));
        node.run(&format!("image delete {name}"));
        node.sh(&format!("cmp model $V/{name}"));
    }
}

#[test]
fn an_internal_snapshot_of_a_qcow2_file_can_be_the_image() {
    let mut node = Node::start();
    node.sh(
        "qemu-img create -q -f qcow2 x.qcow2 8M; qemu-io -f qcow2 -c 'write -P 1 0 1M' x.qcow2 >/dev/null
         qemu-img convert -O raw x.qcow2 then; qemu-img snapshot -c before x.qcow2
         qemu-io -f qcow2 -c 'write -P 2 512k 3M' x.qcow2 >/dev/null; qemu-img convert -O raw x.qcow2 now",
    );
    let file = node.scratch("x.qcow2").display().to_string();
    node.run(&format!("image create now --from {file} --wait"));
    node.run(&format!("image create then --from {file} --snapshot before --wait"));
    node.run("image create again --from image:then --wait");
    node.run("volume create v --image then");
    node.sh("cmp now $I/now; cmp then $I/then; cmp then $I/again; cmp then $V/v");
    assert_eq!(node.json("image get then")["internal_snapshot"], "before");
    node.kill();
    node.restart();
    node.sh("cmp then $I/then; cmp then $V/v");

    let said = node.refused(
        &format!("image create raw --from {}/now --snapshot 1 --wait", node.scratch("").display()),
        1,
    );
    assert!(said.contains("raw"), "{said}");
}

#[test]
fn a_mistyped_snapshot_is_answered_with_those_there_are_and_nothing_is_fetched_again() {
    let mut node = Node::start();
    node.sh(
        "qemu-img create -q -f qcow2 x.qcow2 8M; qemu-io -f qcow2 -c 'write -P 1 0 1M' x.qcow2 >/dev/null
         qemu-img convert -O raw x.qcow2 then; qemu-img snapshot -c before x.qcow2
         qemu-io -f qcow2 -c 'write -P 2 512k 3M' x.qcow2 >/dev/null; qemu-img snapshot -c later x.qcow2",
    );
    let content = fs::read(node.scratch("x.qcow2")).unwrap();
    let len = content.len() as u64;
    let origin = Origin::start(content);
    let create =
        |snapshot: &str| format!("image create x --from {} --snapshot {snapshot} --wait", origin.url());
    let said = node.refused(&create("befor"), 1);
    for part in ["befor", "\"before\" (id \"1\")", "\"later\" (id \"2\")"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(origin.sent(), len);
    assert_eq!(node.json("image get x")["state"], "failed");
    node.kill();
    node.restart();
    node.refused(&create("after"), 1);
    node.run(&create("before"));
    node.sh("cmp then $I/x");
    // To show that it is still the same, the origin sends its last byte.
    assert!(origin.sent() <= len + 2, "{} of {len}", origin.sent());

    // Nothing of an upload is kept.
    let said = node.shell("$B image create up --from - --snapshot befor < x.qcow2").output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("\"before\"") && said.contains("send it again"), "{said}");
    assert_eq!(node.json("image get up")["allocated_bytes"], 0);
}

#[test]
fn qcow2_files_that_cannot_be_served_are_refused_with_the_reason_and_leave_nothing() {
    let node = Node::start();
    node.sh(
        "qemu-img create -q -f raw base 4M
         qemu-img create -q -f qcow2 -F raw -b base backing.qcow2
         qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external.qcow2 4M
         qemu-img create -q -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s luks.qcow2 4M
         qemu-img create -q -f qcow2 whole.qcow2 4M; qemu-io -f qcow2 -c 'write -P 1 0 4M' whole.qcow2 >/dev/null
         cp whole.qcow2 cut.qcow2; truncate -s 3M cut.qcow2
         cp whole.qcow2 version.qcow2; printf '\\0\\0\\0\\7' | dd of=version.qcow2 bs=1 seek=4 conv=notrunc status=none
         cp whole.qcow2 table.qcow2; printf '\\377' | dd of=table.qcow2 bs=1 seek=262151 conv=notrunc status=none
         qemu-img create -q -f qcow2 nothing.qcow2 0",
    );
    for (name, part) in [
        ("backing", "base"),
        ("external", "data"),
        ("luks", "encrypt"),
        ("cut", "past the end of the file"),
        ("version", "version 7"),
        ("table", "L2"),
        ("nothing", "empty"),
    ] {
        let file = node.scratch(&format!("{name}.qcow2"));
        let said = node.refused(&format!("image create {name} --from {} --wait", file.display()), 5);
        assert!(said.contains(part), "{name}: {said}");
        assert_eq!(node.json(&format!("image get {name}"))["state"], "failed");
        assert_eq!(node.json(&format!("image get {name}"))["allocated_bytes"], 0);
        let left: Vec<_> = node.files_on_disk().into_iter().filter(|file| file.contains(name)).collect();
        assert!(left.iter().all(|file| file.ends_with("image.json")), "{left:?}");
        node.run(&format!("image delete {name}"));
    }
}

#[test]
fn a_cluster_that_does_not_decode_fails_alone() {
    let node = Node::start();
    node.sh("yes line of text | head -c 1048576 > base.raw
         qemu-img convert -f raw -O qcow2 -c base.raw x.qcow2
         qemu-img map --output=json -f qcow2 x.qcow2 > /dev/null");
    // The first compressed cluster lies behind the header, counts and tables; its bytes become noise.
    node.sh("dd if=/dev/urandom of=x.qcow2 bs=1 seek=327680 count=64 conv=notrunc status=none");
    node.run(&format!("image create x --from {} --wait", node.scratch("x.qcow2").display()));
    node.run("volume create v --image x");
    let good = node.sh("good=0; for n in $(seq 0 15); do
             if dd if=$V/v of=part bs=64k skip=$n count=1 iflag=direct status=none 2>err; then
                 dd if=base.raw bs=64k skip=$n count=1 status=none | cmp - part; good=$((good + 1))
             else grep -q 'Input/output error' err; fi
         done; echo $good");
    assert_eq!(good.trim(), "15");
    // A volume can be written where its image is broken.
    node.sh(
        "dd if=base.raw of=$V/v bs=64k count=16 conv=notrunc oflag=direct status=none; cmp base.raw $V/v",
    );
}

/// Longest image of the corpus that is read whole through the mount; the others are held against it by the engine's
/// own tests.
const READ_WHOLE_MAX: u64 = 64 * MIB;

#[test]
fn the_corpus_is_served_or_refused_as_it_should_be() {
    let node = Node::start();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/qcow2");
    node.sh_within(&format!("{} corpus > made", corpus.display()), Duration::from_secs(120));
    let manifest: Value =
        serde_json::from_slice(&fs::read(node.scratch("corpus/manifest.json")).unwrap()).unwrap();
    let mut counts = [0; 3];
    for entry in manifest["entries"].as_array().unwrap() {
        let file = node.scratch("corpus").join(entry["file"].as_str().unwrap());
        let (expect, of) = entry["expect"].as_object().unwrap().iter().next().unwrap();
        if !fs::read(&file).unwrap().starts_with(b"QFI\xfb") {
            // To a node that is a raw image.
            continue;
        }
        let create = format!("image create x --from {} --wait --timeout 60s", file.display());
        let lost_at_once = expect == "lost" && of["found_by"] != "read";
        let refused = ["refused", "reference"].contains(&expect.as_str()) || lost_at_once;
        if refused || of["references"] == true || of["size"] == 0 {
            let said = node.refused(&create, 5);
            if refused {
                let plain = |text: &str| text.to_lowercase().replace('_', " ");
                let naming = plain(of["naming"].as_str().unwrap());
                assert!(plain(&said).contains(&naming), "{}: {said}", entry["name"]);
            }
            let left: Vec<_> =
                node.files_on_disk().into_iter().filter(|file| file.contains("images/x-")).collect();
            assert!(left.iter().all(|file| file.ends_with("image.json")), "{}: {left:?}", entry["name"]);
            counts[0] += 1;
        } else if expect == "lost" {
            node.run(&create);
            node.run("volume create v --image x");
            for range in of["ranges"].as_array().unwrap() {
                let (start, len) = (range[0].as_u64().unwrap(), range[1].as_u64().unwrap());
                node.sh(&format!(
                    "! dd if=$V/v of=/dev/null bs={len} iflag=skip_bytes skip={start} count=1 status=none 2> err
                     grep -q 'Input/output error' err"
                ));
            }
            node.run("volume delete v");
            counts[1] += 1;
        } else {
            node.run(&create);
            let size = of["size"].as_u64().filter(|size| *size <= READ_WHOLE_MAX);
            if let (Some(size), Some(sum)) = (size, of["content"]["sha512"].as_str()) {
                let read = node.sh(&format!("head -c {size} $I/x | sha512sum | cut -d' ' -f1"));
                assert_eq!(read.trim(), sum, "{}", entry["name"]);
            }
            counts[2] += 1;
        }
        node.run("image delete x");
    }
    assert!(counts[0] > 120 && counts[1] > 10 && counts[2] > 60, "{counts:?}");
}
