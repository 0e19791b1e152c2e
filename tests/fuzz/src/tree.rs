//! An input that stands for a directory: files one after another, each a byte for its name, its length and its bytes.

use std::{fs, path::Path};

/// Files of one input.
const FILES_MAX: usize = 16;

/// Put the files of `input` under `root`, which is emptied first. `names` are the ones that there may be.
pub fn make(root: &Path, names: &[&str], mut input: &[u8]) {
    let _ = fs::remove_dir_all(root);
    fs::create_dir_all(root).expect("memory to spare");
    for _ in 0..FILES_MAX {
        let [name, low, high, rest @ ..] = input else { break };
        let (bytes, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
        let path = root.join(names[usize::from(*name) % names.len()]);
        fs::create_dir_all(path.parent().unwrap_or(root)).expect("memory to spare");
        fs::write(path, bytes).expect("memory to spare");
        input = rest;
    }
}

/// The input that stands for these files, each named by its place in the list of names.
pub fn input(files: &[(u8, &[u8])]) -> Vec<u8> {
    let mut input = Vec::new();
    for (name, bytes) in files {
        let len = u16::try_from(bytes.len()).expect("seeds are small");
        input.push(*name);
        input.extend(len.to_le_bytes());
        input.extend(*bytes);
    }
    input
}
