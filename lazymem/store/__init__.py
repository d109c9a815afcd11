# SPDX-License-Identifier: Apache-2.0
"""Bytes by URL and range.

    base, locations                       the contract; paths and URLs as text
    remote                                which store a URL leads to
    local, local_store                    files
    http; s3, s3_boto3, s3_writer         web servers; S3 and what speaks its protocol
    objects, obstore_reader               Google's and Azure's stores, by an extra
    aws, refusals                         botocore: credentials, signing; what servers refuse with
    ranges, checks                        one object by ranges; what an answer must look like
    connections, dial, tls, proxies ...   HTTP: the lean client under http and s3
    ahead                                 a blob read in order, ahead of who takes it

The first to import botocore or obstore is a URL that needs it; nothing here imports numpy.
"""
