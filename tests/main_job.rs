//! The main job: an image comes in, is verified, and is served as volumes that are written, snapshotted, cloned, grown
//! and exported; and what the command line says when something is wrong.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use serde_json::Value;

use crate::util::{
    content::{MIB, allocated, pattern, read_at, sparse_image},
    node::Node,
    origin::Origin,
};

const IMAGE_SIZE: u64 = 64 * MIB;

/// A node with the image `base`, fetched by URL.
fn with_image() -> Node {
    let node = Node::start();
    let file = node.scratch("base.raw");
    sparse_image(&file, IMAGE_SIZE);
    let origin = Origin::start(fs::read(&file).unwrap());
    let sum = node.sha512(&file);
    node.run(&format!("image create base --from {} --checksum {sum} --wait", origin.url()));
    node
}

fn keys(object: &Value) -> Vec<String> {
    let mut keys: Vec<String> = object.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    keys
}

fn sorted(names: &str) -> Vec<String> {
    let mut names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn two_volumes_over_an_image_go_their_own_ways_and_the_image_stays() {
    let node = with_image();
    let source = node.scratch("base.raw");
    let sum = node.sha512(&source);
    node.run("volume create a --image base");
    node.run("volume create b --image base");
    node.sh("cmp $T/base.raw $V/a; cmp $T/base.raw $V/b; cmp $T/base.raw $I/base");

    node.write("a", 5 * MIB + 512, &pattern(3 * MIB, 7));
    node.write("a", 0, &[0; 4096]);
    assert_eq!(read_at(&node.volume("a"), 5 * MIB + 512, 3 * MIB), pattern(3 * MIB, 7));
    node.sh("cmp $T/base.raw $V/b; ! cmp -s $T/base.raw $V/a");
    assert_eq!(node.sha512(&node.image("base")), sum);
    assert_eq!(node.json("image get base")["sha512"], sum.as_str());
    node.run("image verify base");
    // Byte for byte what the origin gave, as a file of the disk.
    let kept = node.files_on_disk().into_iter().find(|file| file.ends_with("/image")).unwrap();
    assert_eq!(node.sha512(&node.path("disk").join(kept)), sum);
    // And its holes are holes.
    assert!(
        node.json("image get base")["allocated_bytes"].as_u64().unwrap() <= allocated(&source) * 105 / 100
    );
}

#[test]
fn snapshots_clones_and_flattening_each_keep_what_they_should() {
    let node = with_image();
    node.run("volume create a --image base");
    node.write("a", MIB, &pattern(MIB, 1));
    node.sh("cp $V/a $T/one");
    node.run("snapshot create a one");
    node.write("a", MIB + 4096, &pattern(MIB, 2));
    node.sh("cp $V/a $T/two");
    node.run("snapshot create a two");
    node.write("a", 2 * MIB, &pattern(MIB, 3));
    node.sh("cp $V/a $T/three");

    node.run("volume clone a@one linked");
    node.run("volume clone a full --full");
    node.sh("cmp $V/linked $T/one; cmp $V/full $T/three");
    assert_eq!(node.json("volume get full")["image"], Value::Null);
    assert_eq!(node.json("volume get linked")["image"]["name"], "base");

    node.run("snapshot revert a one --snapshot-first three");
    node.sh("cmp $V/a $T/one");
    let names: Vec<Value> = node.json("snapshot list a").as_array().unwrap().clone();
    let names: Vec<&str> = names.iter().map(|snapshot| snapshot["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "two", "three"]);
    node.run("snapshot revert a three");
    node.sh("cmp $V/a $T/three");

    node.run("snapshot delete a one");
    node.run("snapshot delete a three");
    node.sh("cmp $V/a $T/three; cmp $V/linked $T/one; cmp $V/full $T/three");
    node.run("snapshot revert a two");
    node.sh("cmp $V/a $T/two");

    for volume in ["a", "linked"] {
        node.run(&format!("volume flatten {volume}"));
        assert_eq!(node.json(&format!("volume get {volume}"))["image"], Value::Null);
    }
    node.sh("cmp $V/a $T/two; cmp $V/linked $T/one");
    // Nobody stands on it any more.
    node.run("image delete base");
    node.sh("cmp $V/a $T/two; cmp $V/linked $T/one; cmp $V/full $T/three");
}

#[test]
fn a_volume_grows_and_keeps_its_content_and_does_not_shrink() {
    let node = with_image();
    node.run("volume create a --image base --size 80M");
    assert_eq!(node.volume("a").metadata().unwrap().len(), 80 * MIB);
    node.write("a", 79 * MIB, &pattern(MIB, 1));
    node.run("volume resize a 100M");
    assert_eq!(node.volume("a").metadata().unwrap().len(), 100 * MIB);
    node.sh("cmp -n 67108864 $T/base.raw $V/a");
    assert_eq!(read_at(&node.volume("a"), 79 * MIB, MIB), pattern(MIB, 1));
    assert_eq!(read_at(&node.volume("a"), 80 * MIB, 20 * MIB), vec![0; 20 << 20]);
    node.write("a", 99 * MIB, &pattern(MIB, 2));
    let said = node.refused("volume resize a 90M", 1);
    assert!(said.contains('a') && said.lines().count() == 1, "{said}");
    let said = node.refused("volume create small --image base --size 1M", 1);
    assert!(said.contains("67108864") || said.contains("64"), "{said}");
    node.run("volume create odd --size 1000001b");
    assert_eq!(node.json("volume get odd")["size_bytes"], 1_000_448);
}

#[test]
fn exports_equal_what_the_mount_shows_and_keep_the_holes() {
    let node = with_image();
    node.run("volume create a --image base --size 1G");
    for n in 0..16 {
        node.write("a", 70 * MIB + n * 50 * MIB, &pattern(MIB, n));
    }
    node.sh("cp --sparse=always $V/a $T/before");
    node.run("snapshot create a s");
    node.write("a", 70 * MIB, &pattern(MIB, 99));
    node.run("volume export a now.raw");
    node.run("volume export a@s then.raw");
    node.sh("qemu-img compare -f raw -F raw $V/a now.raw; cmp $V/a now.raw; cmp before then.raw");
    // 16 MiB of its own and 4 of the image's.
    let data = 20 * MIB;
    for file in ["now.raw", "then.raw"] {
        let taken = allocated(&node.scratch(file));
        assert!(taken <= data * 105 / 100, "{file} takes {taken} bytes for {data} of data");
    }
    node.sh("$B volume export a@s - | cmp - before; $B image export base - | cmp - base.raw");
    node.run("image export base image.raw");
    node.sh("cmp base.raw image.raw");
    let said = node.refused("volume export a now.raw", 4);
    assert!(said.contains("now.raw"), "{said}");
    node.run("volume export a now.raw --force");
    // Exports leave nothing but what they were asked for.
    assert_eq!(node.sh("ls -A").split_whitespace().count(), 5);
}

#[test]
fn images_come_from_paths_volumes_and_images_too() {
    let node = with_image();
    node.run("volume create a --image base");
    node.write("a", MIB, &pattern(MIB, 5));
    node.run("image create golden --from volume:a --wait");
    node.sh("cmp $I/golden $V/a");
    node.run("snapshot create a s");
    node.write("a", MIB, &pattern(MIB, 6));
    node.run("image create older --from volume:a@s --wait");
    node.run("image create twin --from image:older --wait");
    node.sh("cmp $I/golden $I/older; cmp $I/twin $I/older; ! cmp -s $I/golden $V/a");
    // Only the named snapshot is left of the passing ones.
    assert_eq!(node.json("snapshot list a").as_array().unwrap().len(), 1);

    // A length that is no multiple of a sector: the last one's missing bytes read as zeros.
    fs::write(node.scratch("odd.raw"), pattern(1_000_001, 8)).unwrap();
    node.run("image create odd --from odd.raw --wait");
    let odd = node.json("image get odd");
    assert_eq!((&odd["size_bytes"], &odd["virtual_size_bytes"]), (&1_000_001.into(), &1_000_448.into()));
    node.run("volume create o --image odd");
    let mut expected = pattern(1_000_001, 8);
    expected.resize(1_000_448, 0);
    assert_eq!(fs::read(node.volume("o")).unwrap(), expected);
    node.write("o", 999_936, &[1; 512]);
    expected[999_936..].fill(1);
    assert_eq!(fs::read(node.volume("o")).unwrap(), expected);
}

#[test]
fn a_wrong_checksum_is_exit_code_5_shows_both_sums_and_leaves_no_bytes() {
    let node = Node::start();
    let content = pattern(3 * MIB, 1);
    fs::write(node.scratch("x.raw"), &content).unwrap();
    let origin = Origin::start(content);
    let before = node.allocated_on_disk();
    let (wrong, actual) = ("ab".repeat(64), node.sha512(&node.scratch("x.raw")));
    let said = node.refused(&format!("image create x --from {} --checksum {wrong} --wait", origin.url()), 5);
    assert!(said.contains(&wrong) && said.contains(&actual), "{said}");
    assert_eq!(node.json("image get x")["state"], "failed");
    assert!(node.allocated_on_disk() < before + MIB, "the bytes are still there");
    node.refused("volume create v --image x", 4);
    node.run("image delete x");
    assert!(node.names("image").is_empty());
    // sha256 is understood, right and wrong.
    let sum = node.sh("sha256sum < x.raw");
    let sum = sum.split_whitespace().next().unwrap();
    node.run(&format!("image create y --from {} --checksum sha256:{sum} --wait", origin.url()));
    node.refused(&format!("image create z --from x.raw --checksum sha256:{} --wait", "0".repeat(64)), 5);
}

#[test]
fn an_image_that_no_longer_is_what_it_was_is_exit_code_5() {
    let node = with_image();
    let kept = node.files_on_disk().into_iter().find(|file| file.ends_with("/image")).unwrap();
    let kept = node.path("disk").join(kept);
    node.sh(&format!("chmod u+w '{}'", kept.display()));
    fs::File::options().write(true).open(&kept).unwrap().write_all_at(b"damage", 16 * MIB).unwrap();
    let said = node.refused("image verify base", 5);
    assert!(said.contains("base"), "{said}");
}

#[test]
fn what_cannot_be_found_or_collides_or_makes_no_sense_has_its_exit_code_and_one_line() {
    let node = with_image();
    node.run("volume create a --image base");
    node.run("snapshot create a s");
    for (line, code, named) in [
        ("image get nope", 3, "nope"),
        ("volume get nope", 3, "nope"),
        ("volume delete nope", 3, "nope"),
        ("volume create v --image nope", 3, "nope"),
        ("volume clone nope v", 3, "nope"),
        ("volume clone a@nope v", 3, "nope"),
        ("volume export a@nope out", 3, "nope"),
        ("snapshot revert a nope", 3, "nope"),
        ("snapshot delete a nope", 3, "nope"),
        ("volume attach nope", 3, "nope"),
        ("image create i --from image:nope --wait", 3, "nope"),
        ("image create i --from volume:nope --wait", 3, "nope"),
        ("volume create a --size 1M", 4, "\"a\""),
        ("volume clone a a", 4, "\"a\""),
        ("snapshot create a s", 4, "\"s\""),
        ("image create base --from base.raw", 4, "\"base\""),
        ("image delete base", 4, "a"),
        ("volume create", 2, "NAME"),
        ("volume create v", 2, "--image"),
        ("volume create v --size 1X", 2, "1X"),
        ("volume frobnicate", 2, "frobnicate"),
        ("image create i3 --from /nonexistent/file --wait", 1, "/nonexistent/file"),
        ("volume export a /nonexistent/dir/out", 1, "/nonexistent/dir"),
    ] {
        let said = node.refused(line, code);
        assert!(said.contains(named), "bedplate {line} does not name {named}: {said}");
        assert!(code == 2 || said.trim_end().lines().count() == 1, "bedplate {line}: {said}");
    }
    assert_eq!(node.names("volume"), ["a"]);
}

#[test]
fn names_are_checked_wherever_one_is_made() {
    let node = Node::start();
    node.run("volume create v --size 1M");
    let long = "n".repeat(64);
    for name in ["a", "A.b_c-9", "9", "_", long.as_str()] {
        node.run(&format!("volume create {name} --size 1M"));
        node.run(&format!("snapshot create v {name}"));
    }
    let too_long = "n".repeat(65);
    for name in [".hidden", "..", "a/b", "ä", "a:b", "a~b", too_long.as_str()] {
        for line in [
            format!("volume create {name} --size 1M"),
            format!("snapshot create v {name}"),
            format!("volume clone v {name}"),
            format!("image create {name} --from /dev/zero"),
        ] {
            let ended = node.try_run(&line);
            let code = ended.status.code();
            assert!(code == Some(1) || code == Some(2), "{line}: {code:?} {}", ended.stderr);
            assert!(ended.stderr.contains("name"), "{line}: {}", ended.stderr);
        }
    }
    assert!(node.names("image").is_empty());
    assert_eq!(node.names("volume").len(), 6);
}

#[test]
fn json_has_exactly_the_fields_that_are_promised() {
    let node = with_image();
    node.run("volume create a --image base");
    node.run("snapshot create a s");
    let image = node.json("image get base");
    let promised = "name uuid state format size_bytes virtual_size_bytes allocated_bytes sha512 source copies io_path created_at";
    assert_eq!(keys(&image), sorted(promised));
    assert_eq!(keys(&image["copies"][0]), sorted("disk state progress message code verification"));
    assert_eq!((&image["state"], &image["format"]), (&"ready".into(), &"raw".into()));
    assert_eq!(image["virtual_size_bytes"], IMAGE_SIZE);
    assert_eq!(node.json("image list").as_array().unwrap(), &[image]);

    let volume = node.json("volume get a");
    let promised =
        "name uuid state size_bytes allocated_bytes image snapshots path device io_path created_at";
    assert_eq!(keys(&volume), sorted(&format!("{promised} disk message holders")));
    assert_eq!(keys(&volume["image"]), sorted("name uuid"));
    assert_eq!(keys(&volume["snapshots"][0]), sorted("name size_bytes created_at"));
    assert_eq!(volume["path"], node.volume("a").display().to_string());
    assert_eq!((&volume["state"], &volume["device"]), (&"ready".into(), &Value::Null));
    assert_eq!(node.json("volume list").as_array().unwrap(), &[volume]);
}

#[test]
fn the_way_that_an_open_files_bytes_go_is_shown() {
    let node = with_image();
    node.run("volume create a --image base");
    assert_eq!(node.json("volume get a")["io_path"], Value::Null);
    let (volume, image) = (File::open(node.volume("a")).unwrap(), File::open(node.image("base")).unwrap());
    let info = node.http("GET", "/v1/node").unwrap();
    let transport =
        ["uring", "classic"].into_iter().find(|word| info.contains(&format!("{word:?}"))).unwrap();
    assert_eq!(node.json("volume get a")["io_path"], transport);
    let path = node.json("image get base")["io_path"].as_str().unwrap().to_owned();
    assert!(["passthrough", "cached"].contains(&path.as_str()), "{path}");
    assert!(node.run("volume get a").contains("I/O path"));
    let metrics = node.http("GET", "/metrics").unwrap();
    for used in [transport, &path] {
        assert!(metrics.contains(&format!("bedplate_open_files{{path=\"{used}\"}} 1")), "{metrics}");
    }
    drop((volume, image));
}

#[test]
fn a_volume_waits_for_its_image_when_it_is_told_to_and_is_refused_otherwise() {
    let node = Node::start();
    let content = pattern(8 * MIB, 1);
    let origin = Origin::held_at(content.clone(), 1 << 20);
    node.run(&format!("image create base --from {}", origin.url()));
    let said = node.refused("volume create v --image base", 4);
    assert!(said.contains("--wait"), "{said}");
    node.refused("volume create v --image base --wait --timeout 1s", 6);
    let waiting = node.begin("volume create v --image base --wait");
    origin.open();
    let ended = waiting.wait(crate::util::run::DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    assert_eq!(fs::read(node.volume("v")).unwrap(), content);
    assert_eq!(origin.sent(), 8 * MIB);
}

#[test]
fn a_download_that_is_cancelled_or_deleted_leaves_nothing() {
    let node = Node::start();
    let origin = Origin::held_at(pattern(32 * MIB, 1), 16 << 20);
    let before = node.files_on_disk();
    for verb in ["cancel", "delete"] {
        node.run(&format!("image create base --from {}", origin.url()));
        crate::util::run::until("it arrives", || {
            node.json("image get base")["copies"][0]["progress"]["done_bytes"].as_u64() > Some(MIB)
        });
        node.run(&format!("image {verb} base"));
        if verb == "cancel" {
            assert_eq!(node.json("image get base")["state"], "failed");
            assert!(node.allocated_on_disk() < 80 * MIB, "{}", node.sh("du -a $D"));
            node.run("image delete base");
        }
        assert!(node.names("image").is_empty());
        assert_eq!(node.files_on_disk(), before);
    }
}

#[test]
fn what_is_in_use_is_not_deleted_or_reverted_and_the_user_is_named() {
    let node = with_image();
    node.run("volume create web1 --image base");
    node.run("snapshot create web1 s");
    let said = node.refused("image delete base", 4);
    assert!(said.contains("web1"), "{said}");
    {
        let _open = fs::File::open(node.volume("web1")).unwrap();
        for line in ["volume delete web1", "snapshot revert web1 s"] {
            let said = node.refused(line, 4);
            assert!(said.contains("volumes/web1"), "{line}: {said}");
        }
    }
    let device = node.json("volume attach web1")["device"].as_str().unwrap().to_owned();
    for line in ["volume delete web1", "snapshot revert web1 s"] {
        let said = node.refused(line, 4);
        assert!(said.contains(&device), "{line}: {said}");
    }
    node.run("volume detach web1");
    {
        let _open = fs::File::open(node.image("base")).unwrap();
        node.run("volume delete web1");
        let said = node.refused("image delete base", 4);
        assert!(said.contains("mount"), "{said}");
    }
    crate::util::run::until("the kernel closes the image", || {
        node.try_run("image delete base").status.success()
    });
    assert!(node.sh("ls $I $V").lines().all(|line| line.is_empty() || line.ends_with(':')));
}
