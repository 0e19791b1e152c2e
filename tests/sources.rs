//! What `--from` names: secrets that stay secret, and sources that are not there.

use std::{fs, net::TcpListener, path::Path, process::Command};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::util::{content::pattern, node::Node, origin::Origin, run::until};

const PASSWORD: &str = "correct-horse-battery";

/// Nothing that the node wrote or says holds the password.
fn assert_secret(node: &Node) {
    for place in ["state", "disk", "log"] {
        let found = node.shell(&format!("grep -rlae {PASSWORD} $T/../{place}")).output().unwrap();
        assert_eq!(found.status.code(), Some(1), "{place}: {}", String::from_utf8_lossy(&found.stdout));
    }
    for path in ["/v1/images", "/v1/images/private", "/v1/jobs", "/v1/node", "/metrics"] {
        assert!(!node.http("GET", path).unwrap().contains(PASSWORD), "{path}");
    }
    assert!(!node.run("image list").contains(PASSWORD) && !node.run("image get private").contains(PASSWORD));
}

#[test]
fn a_password_in_a_url_is_in_no_record_answer_message_or_log_nor_on_a_command_line() {
    let mut node = Node::idle();
    node.wrap(&["env", "BEDPLATE_LOG=debug"]);
    node.restart();
    let origin = Origin::start(pattern(1 << 20, 1));
    let secret = |url: &str| url.replace("http://", &format!("http://user:{PASSWORD}@"));
    fs::write(node.scratch("url"), secret(&origin.url())).unwrap();
    node.run("image create private --from @url --wait");
    assert_eq!(node.json("image get private")["source"], origin.url());
    assert_secret(&node);
    node.run("image delete private");

    // What is refused, and what fails, does not repeat it either.
    let wrong = "0".repeat(128);
    let said = node.refused(&format!("image create private --from @url --checksum {wrong} --wait"), 5);
    assert!(!said.contains(PASSWORD), "{said}");
    assert_secret(&node);
    node.run("image delete private");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/image.raw", silent.local_addr().unwrap());
    drop(silent);
    fs::write(node.scratch("url"), secret(&url)).unwrap();
    node.run("image create private --from @url");
    until("it was tried", || node.run("image get private").contains("attempt"));
    assert_secret(&node);
    node.run("image delete private");
    for bad in ["ftp://user:P@host/x", "http://user:P@/", "nonsense:P"] {
        fs::write(node.scratch("url"), bad.replace('P', PASSWORD)).unwrap();
        let said = node.refused("image create other --from @url", 1);
        assert!(!said.contains(PASSWORD), "{said}");
    }
    assert!(!node.log().contains(PASSWORD));
}

#[test]
fn a_source_that_is_not_there_is_not_found_at_once_and_nothing_is_made() {
    let node = Node::start();
    node.run("volume create v --size 1M");
    node.run("snapshot create v s");
    for source in ["volume:none", "volume:v@none", "volume:none@s", "image:none"] {
        let said = node.refused(&format!("image create i --from {source}"), 3);
        assert!(said.contains("\"none\"") && said.contains("not found"), "{said}");
        assert_eq!(node.names("image"), [""; 0]);
    }
    assert!(!node.files_on_disk().iter().any(|file| file.starts_with("images/")));
    node.run("image create i --from volume:v@s --wait");
}

#[test]
fn a_longhorn_replica_with_its_backing_file_becomes_an_image() {
    let node = Node::start();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/longhorn/02-raw-backing.tar.zst");
    node.sh(&format!("tar -I zstd -xf {fixture}"));
    let expected: Value =
        serde_json::from_slice(&fs::read(node.scratch("02-raw-backing/expected.json")).unwrap()).unwrap();
    let said = node.refused("image create no --from 02-raw-backing/replica --wait", 5);
    assert!(said.contains("--backing"), "{said}");
    let create = |name: &str, flags: &str| {
        let from = "--from 02-raw-backing/replica --backing 02-raw-backing/backing/backing";
        node.run(&format!("image create {name} {from} {flags} --wait"));
        node.sha512(&node.image(name))
    };
    assert_eq!(create("head", ""), expected["head"]["sha512"].as_str().unwrap());
    for (name, snapshot) in expected["snapshots"].as_object().unwrap() {
        assert_eq!(create(name, &format!("--snapshot {name}")), snapshot["sha512"].as_str().unwrap());
        let image = node.json(&format!("image get {name}"));
        assert!(image["source"].as_str().unwrap().ends_with(&format!("replica@{name}")), "{image}");
    }
    let image = node.json("image get head");
    let sources = image["sources"].as_array().unwrap();
    let shown = node.run("image get head");
    for source in sources {
        let path = Path::new(source["path"].as_str().unwrap());
        assert!(path.is_absolute(), "{image}");
        assert_eq!(source["sha512"], node.sha512(path));
        assert_eq!(source["size_bytes"], fs::metadata(path).unwrap().len());
        assert!(shown.contains(source["path"].as_str().unwrap()), "{shown}");
        assert!(shown.contains(source["sha512"].as_str().unwrap()), "{shown}");
    }
    let ends = |at: usize, name: &str| sources[at]["path"].as_str().unwrap().ends_with(name);
    assert!(sources.len() > 2 && ends(0, ".img") && ends(sources.len() - 1, "backing/backing"), "{image}");
}

#[test]
fn a_replica_without_a_backing_file_is_joined_where_that_is_said() {
    let node = Node::start();
    node.sh("mkdir r; truncate -s 1M r/volume-head-000.img
             head -c 4096 /dev/urandom | dd of=r/volume-head-000.img seek=3 bs=4096 conv=notrunc status=none
             echo '{\"Parent\":\"\"}' > r/volume-head-000.img.meta");
    // Without volume.meta nobody knows whether there was one.
    let said = node.refused("image create x --from r --wait", 5);
    assert!(said.contains("--backing none"), "{said}");
    node.run("image create x --from r --backing none --wait");
    node.sh("cmp r/volume-head-000.img $I/x");
}

#[test]
fn a_qcow2_file_and_those_that_it_names_become_one_image_where_that_is_allowed() {
    let node = Node::start();
    node.sh("mkdir images; cd images; head -c 3M /dev/urandom > base.raw
         qemu-img create -q -f qcow2 -F raw -b base.raw middle.qcow2 4M
         qemu-io -f qcow2 -c 'write -P 1 1M 64k' middle.qcow2 > said
         qemu-img create -q -f qcow2 -F qcow2 -b middle.qcow2 top.qcow2
         qemu-io -f qcow2 -c 'write -P 2 2M 64k' top.qcow2 > said; qemu-img convert -O raw top.qcow2 whole");
    let said = node.refused("image create no --from images/top.qcow2 --wait", 5);
    assert!(said.contains("middle.qcow2") && said.contains("--allow-references"), "{said}");
    node.run("image create all --from images/top.qcow2 --allow-references images --wait");
    node.sh("cmp images/whole $I/all; rm -r images; cmp $I/all $I/all");
    let image = node.json("image get all");
    assert_eq!(image["format"], "raw");
    let names: Vec<_> = image["sources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|source| source["path"].as_str().unwrap().rsplit('/').next().unwrap())
        .collect();
    assert_eq!(names, ["top.qcow2", "middle.qcow2", "base.raw"]);
    node.sh("mkdir outside inside; qemu-img create -q -f raw outside/secret 1M
             qemu-img create -q -f qcow2 -F raw -b $PWD/outside/secret inside/x.qcow2");
    node.refused("image create leak --from inside/x.qcow2 --allow-references inside --wait", 5);
    node.refused("image create odd --from http://127.0.0.1:1/x --backing inside", 1);
}

#[test]
fn a_volume_of_a_disk_that_nobody_serves_becomes_an_image_of_its_layers_and_maps() {
    let mut other = Node::start();
    other.run("volume create v --size 4M");
    other.write("v", 1 << 20, &pattern(100_000, 3));
    other.run("snapshot create v s");
    other.write("v", 5000, &pattern(5000, 4));
    other.sh("cp $V/v content");
    other.stop(Signal::SIGTERM);
    let record = other.files_on_disk().into_iter().find(|file| file.ends_with("volume.json")).unwrap();
    let volume = other.path("disk").join(record).parent().unwrap().display().to_string();

    let node = Node::start();
    node.run(&format!("image create x --from {volume} --wait"));
    node.sh(&format!("cmp {} $I/x", other.scratch("content").display()));
    let image = node.json("image get x");
    let sources = image["sources"].as_array().unwrap();
    let names: Vec<_> =
        sources.iter().map(|source| source["path"].as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["data", "map", "data", "map"]);
    for source in sources {
        assert_eq!(source["sha512"], node.sha512(Path::new(source["path"].as_str().unwrap())));
    }
}

#[test]
fn a_backing_file_that_is_a_block_device_is_listed_with_the_digest_of_all_of_it() {
    let node = Node::start();
    node.sh("mkdir r; truncate -s 2M r/volume-head-000.img; echo '{\"Parent\":\"\"}' > r/volume-head-000.img.meta");
    fs::write(node.scratch("backing"), pattern(2 << 20, 5)).unwrap();
    let device = LoopDevice::over(&node.scratch("backing"));
    node.run(&format!("image create x --from r --backing {} --wait", device.path()));
    node.sh("cmp backing $I/x");
    let source = &node.json("image get x")["sources"][1];
    assert_eq!(source["path"], device.path());
    assert_eq!(
        (&source["size_bytes"], &source["sha512"]),
        (&(2 << 20).into(), &node.sha512(&node.scratch("backing")).into())
    );
}

/// A read-only loop device, which goes with this.
struct LoopDevice(String);

impl LoopDevice {
    fn over(file: &Path) -> LoopDevice {
        let made =
            Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        LoopDevice(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }

    fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Nothing else is to be done about one that stays.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
