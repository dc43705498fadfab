//! Messages of the KServe v2 protocol and of Triton's model configuration, made from the files in
//! `proto/`.

#![allow(unused_qualifications, clippy::all)]

tonic::include_proto!("inference");
