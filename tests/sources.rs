//! What `--from` names: secrets that stay secret, and sources that are not there.

use std::{fs, net::TcpListener};

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
    assert_eq!(node.json("image get all")["format"], "raw");
    node.sh("mkdir outside inside; qemu-img create -q -f raw outside/secret 1M
             qemu-img create -q -f qcow2 -F raw -b $PWD/outside/secret inside/x.qcow2");
    node.refused("image create leak --from inside/x.qcow2 --allow-references inside --wait", 5);
    node.refused("image create odd --from http://127.0.0.1:1/x --backing inside", 1);
}
